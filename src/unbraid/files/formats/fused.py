"""The two layouts of transformers such as Flux and SD3: original files, and kohya's, fuse q, k, v (and the MLP) into one matrix;
diffusers splits them.

In memory everything is split. Splitting slices the rows of `up` and shares `down`; fusing keeps `down` if all
parts have the same one, and otherwise stacks them (rank 3r or 4r) with a block-diagonal `up`. Both are exact.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import matrices, wide
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.families import DESIGNS
from unbraid.files.formats.recognise import numbered, split_names, template_of

_LAST = "final_layer.adaLN_modulation.1"


def split(module: str, lora: Lora, family: Family) -> dict[str, Lora]:
    """One module of a file → the diffusers modules that it contains. Errors: rows that cannot be q, k and v."""
    names = split_names(module, family)
    if len(names) == 1:
        return {names[0]: _swapped(module, lora) if names[0] != module else lora}
    down, up = matrices(lora)
    hidden = len(up) // 3 if len(names) == 3 else down.shape[1]
    sizes = [hidden] * 3 + ([len(up) - 3 * hidden] if len(names) == 4 else [])
    if sum(sizes) != len(up) or min(sizes) < 0:
        raise UsageError(f"{len(up)} rows cannot be q, k and v", module, "The file is damaged, or for another model.")
    empty = not bool(up.any())
    out = {}
    for name, part in zip(names, up.split(sizes), strict=True):
        used = part.new_ones(part.shape[1], dtype=torch.bool) if empty else (part != 0).any(0)
        if len(part) and bool(used.any()):
            out[name] = _columns(down, part, used, lora.alpha)
    return out


def fuse(modules: Mapping[str, Lora], family: Family) -> dict[str, Lora]:
    """All modules in the layout of kohya's files. Text encoders, and modules that are in no table, stay as they are."""
    if family not in DESIGNS or DESIGNS[family].kohya != "original":
        return dict(modules)
    groups: dict[str, dict[int, Lora]] = {}
    leaves: dict[str, tuple[str, ...]] = {}
    for name, lora in modules.items():
        original, place, parts = _original(name, family)
        groups.setdefault(original, {})[place] = lora
        leaves[original] = parts
    return {
        name: _swapped(name, found[0]) if len(leaves[name]) == 1 else _fused(found, len(leaves[name]))
        for name, found in groups.items()
    }


def _original(module: str, family: Family) -> tuple[str, int, tuple[str, ...]]:
    """The original module that contains this one, the index in it, and all templates that it contains. A module that is not one of
    diffusers' contains only itself."""
    fit = template_of(module, family) if module.startswith("transformer.") else None
    if not fit or fit.template not in DESIGNS[family].diffusers:
        return module, 0, (module,)
    for old, parts in DESIGNS[family].original.items():
        if fit.template in parts:
            return f"transformer.{numbered(old, fit)}", parts.index(fit.template), parts
    raise UsageError(f"{family} files have no such module in kohya's names", module, "Write it with --to diffusers.")


def _columns(down: Tensor, up: Tensor, used: Tensor, alpha: float) -> Lora:
    if bool(used.all()):
        return Lora(down, up, alpha)
    return Lora(down[used], up[:, used], alpha * int(used.sum()) / len(down))


def _fused(parts: Mapping[int, Lora], count: int) -> Lora:
    some = next(iter(parts.values()))
    hidden = some.down.shape[1]
    sizes = {
        place: len(parts[place].up) if place in parts else hidden * (4 if place == 3 else 1) for place in range(count)
    }
    scales = {place: lora.alpha / len(lora.down) for place, lora in parts.items()}
    shared = all(torch.equal(lora.down, some.down) and lora.alpha == some.alpha for lora in parts.values())
    if shared:
        ups = [parts[i].up if i in parts else some.up.new_zeros(sizes[i], len(some.down)) for i in range(count)]
        return Lora(some.down, torch.cat(ups), some.alpha)
    common = next(iter(scales.values()))
    down = torch.cat([lora.down for _, lora in sorted(parts.items())])
    columns = []
    for place, lora in sorted(parts.items()):
        up = lora.up if scales[place] == common else wide(lora.up) * (scales[place] / common)
        before = sum(sizes[i] for i in range(place))
        after = sum(sizes[i] for i in range(place + 1, count))
        columns.append(torch.cat([up.new_zeros(before, up.shape[1]), up, up.new_zeros(after, up.shape[1])]))
    return Lora(down, torch.cat(columns, 1), common * len(down))


def _swapped(module: str, lora: Lora) -> Lora:
    """Swap the halves of `up` where diffusers stores scale and shift in the opposite order: in the last layer's modulation, and in SD3's
    last block, which has 2·k outputs."""
    last = module.endswith(_LAST) or (".context_block.adaLN" in module and len(lora.up) == 2 * lora.down.shape[1])
    return Lora(lora.down, torch.cat(lora.up.chunk(2)[::-1]), lora.alpha) if last else lora
