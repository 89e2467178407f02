"""Merging several LoRAs into one, module by module. Imports no library but torch.

Weights work as strengths do in a UI: `concat` of a at 0.7 and b at 0.4 is exactly a loaded at 0.7 together with b at 0.4.
Ranks, alphas and sets of modules may differ; weights may be negative. A module that only one LoRA has is kept.
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from unbraid.common.errors import UsageError, suggestion
from unbraid.core.lora import Lora
from unbraid.core.lowrank import matrices, rescaled
from unbraid.core.selectors import Blocks, chosen, left_out, selects
from unbraid.files.merge_methods import METHODS, Method, Part, Size, all_equal


@dataclass(frozen=True)
class Merged:
    """One merged module. `kept`: the share of its squared norm that truncation kept."""

    name: str
    lora: Lora
    kept: float


def merge(
    loras: Sequence[Mapping[str, Lora]],
    weights: Sequence[float],
    method: str = "concat",
    size: Size | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Iterator[Merged]:
    """Merge LoRAs (module name → factors). Yields the merged modules one by one, all with the same alpha.

    `dtype=None`: the widest dtype of the inputs. `settings` are those of the method (`density`, `seed`, `mu`, `blocks`).
    Errors: unknown methods and settings, shapes that do not fit each other, NaN.
    """
    size, function = size or Size(), _method(method, settings)
    if len(loras) != len(weights) or not loras:
        raise UsageError(f"{len(weights)} weights for {len(loras)} LoRAs", "merge", "Give one weight for each LoRA.")
    if not all(isfinite(weight) for weight in weights):
        raise UsageError("a weight is not finite", "merge", "Give numbers such as 0.7.")
    _check(size, settings)
    dtype = dtype or _widest(loras)
    alpha = float(size.rank or _common_rank(loras) * _common_strength(loras[0], weights[0]))
    found = False
    for name in dict.fromkeys(name for lora in loras for name in lora):
        parts = [
            Part(lora[name], weight, i - len(loras))
            for i, (lora, weight) in enumerate(zip(loras, weights, strict=True))
            if name in lora and weight and lora[name].alpha
        ]
        made = function(name, _fitting(name, parts), size, **settings) if parts else None
        if made:
            found = True
            yield Merged(name, rescaled(made[0], alpha, dtype, name), made[1])
    if not found:
        raise UsageError("nothing is left to merge", method, "Check the weights and the method's blocks.")


def _method(method: str, settings: Mapping[str, Any]) -> Method:
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", "merge", suggestion(method, METHODS))
    known = [p.name for p in inspect.signature(METHODS[method]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in settings:
        if key not in known:
            raise UsageError(f"{method} has no setting {key!r}", "merge", f"It has: {', '.join(known) or 'none'}.")
    return METHODS[method]


def _check(size: Size, settings: Mapping[str, Any]) -> None:
    if size.rank is not None and size.rank < 1:
        raise UsageError(f"rank {size.rank} is not possible", "rank", "Give 1 or more.")
    if size.energy is not None and not 0 < size.energy <= 1:
        raise UsageError(
            f"energy {size.energy} is not a share", "energy", "Give more than 0 and at most 1, such as 0.99."
        )
    if not 0 < settings.get("density", 1) <= 1:
        raise UsageError(f"density {settings['density']} is not a share", "density", "Give more than 0 and at most 1.")
    if settings.get("mu", 0) < 0:
        raise UsageError(f"mu {settings['mu']} is negative", "mu", "Give 0 (plain sum) or more; 0.5 as published.")


def _fitting(name: str, parts: Sequence[Part]) -> Sequence[Part]:
    sizes = {tuple(matrix.shape[i] for i, matrix in zip((1, 0), matrices(part.lora), strict=True)) for part in parts}
    if len(sizes) > 1:
        shapes = " and ".join(f"{d}×{k}" for k, d in sorted(sizes))
        raise UsageError(f"the LoRAs' shapes differ: {shapes}", name, "They were made for different base models.")
    return parts


def _widest(loras: Sequence[Mapping[str, Lora]]) -> torch.dtype:
    dtypes = {part.dtype for lora in loras for one in lora.values() for part in (one.down, one.up)}
    out = dtypes.pop()
    for dtype in dtypes:
        out = torch.promote_types(out, dtype)  # fp16 with bf16: fp32
    return out


def _common_strength(lora: Mapping[str, Lora], weight: float) -> float:
    """The most common |w| · alpha / r of the modules. With this in the merged file's alpha, `concat` need not scale the first LoRA's
    factors."""
    ratios = Counter(abs(weight * one.alpha) / len(one.down) for one in lora.values())
    return next((ratio for ratio, _ in ratios.most_common() if ratio), 1.0)


def _common_rank(loras: Sequence[Mapping[str, Lora]]) -> int:
    ranks: Counter[int] = Counter()
    for name in dict.fromkeys(name for lora in loras for name in lora):
        downs, ups = zip(*((lora[name].down, lora[name].up) for lora in loras if name in lora), strict=True)
        shared = all_equal(downs) or all_equal(ups)
        ranks[len(downs[0]) if shared else sum(len(down) for down in downs)] += 1
    return ranks.most_common(1)[0][0] if ranks else 1


def chosen_blocks(names: Sequence[Iterable[str]], blocks: Blocks) -> dict[str, tuple[str, ...]]:
    """Role → the modules that it takes: the content's from all LoRAs but the last, the style's from the last. `names`: the
    modules of each. Raises UsageError if a selector selects none."""
    found = chosen(blocks, dict.fromkeys(name for some in names for name in some), "--blocks")
    held = {"content": {name for some in names[:-1] for name in some}, "style": set(names[-1])}
    return {role: tuple(name for name in found[role] if name in held[role]) for role in found}


def kept_by_role(names: Sequence[Iterable[str]], blocks: Blocks) -> dict[str, tuple[str, ...]]:
    """Role → the modules that it keeps where LoRAs leave out the layers of the other role. `names`: as for `chosen_blocks`."""
    held = {"content": dict.fromkeys(name for some in names[:-1] for name in some), "style": names[-1]}
    kept = {role: tuple(name for name in held[role] if not selects(left_out(blocks, role), name)) for role in held}
    return kept if blocks else {}
