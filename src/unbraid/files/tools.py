"""What the commands convert, resize, edit and merge do, as functions: files in, one checked file out."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import wide
from unbraid.files.changes import TOLD, Ways
from unbraid.files.checkpoint_file import opened_checkpoint
from unbraid.files.formats.block_weights import block_weights
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.encode import Dialect, dialect_for
from unbraid.files.formats.lycoris import LIMIT
from unbraid.files.formats.sources import common_family, merged_metadata
from unbraid.files.lora_file import LoraFile, read, write
from unbraid.files.merge import Merged, Size, merge


@dataclass(frozen=True)
class Source:
    """One LoRA of a merge: its file, its strength, and block rules (see `unbraid.files.formats.block_weights`)."""

    path: Path
    weight: float = 1.0
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What was written: modules, the ranks' range, and the share of the squared norm kept (mean, worst); how many changes of norms
    and biases are kept beside them; and, of the modules that were no LoRA in the files read, how many and the worst error."""

    path: Path
    modules: int
    ranks: tuple[int, int]
    kept: tuple[float, float]
    family: Family
    bundled: tuple[str, ...] = ()  # embeddings that came along
    vectors: int = 0
    densified: tuple[int, float] = (0, 0.0)


def convert(
    source: str | Path,
    out: str | Path,
    to: Dialect | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> Done:
    """Write a LoRA in another dialect (default: the one that most tools of its family read). Lossless by default:
    a factor that must be scaled by what its dtype cannot hold exactly becomes fp32. LoHa, LoKr, DoRA and full changes become LoRAs:
    see `unbraid.files.changes`; `base`: the checkpoint that DoRA was trained on."""
    with told(base) as ways:
        lora = read(source, ways=ways)
    return _write(lora, out, dtype, dialect=to)


def resize(
    source: str | Path,
    out: str | Path,
    size: Size,
    to: Dialect | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> Done:
    """Every module at a lower rank: the best approximation, by QR and a small SVD."""
    if size == Size():
        raise UsageError("no size is given", "resize", "Give --rank N or --energy X.")
    with told(base, size.rank) as ways:
        lora = read(source, ways=ways)
    merged = list(merge([lora.modules], [1.0], size=size, dtype=dtype))
    strings = lora.metadata | {"unbraid.resized": json.dumps({"rank": size.rank, "energy": size.energy})}
    small = replace(lora, modules=_modules(merged), metadata=strings)
    return _write(small, out, dtype or _dtype(merged), _kept(merged), to)


def edit(
    source: str | Path,
    out: str | Path,
    blocks: Iterable[str] = (),
    strength: float = 1.0,
    metadata: Mapping[str, str] | None = None,
    to: Dialect | None = None,
) -> Done:
    """Scale blocks (0 takes them out), scale the whole, set metadata. Exact, as `convert` is."""
    lora = read(source, ways=TOLD)
    modules, vectors = scaled(lora, tuple(blocks), strength)
    strings = lora.metadata | dict(metadata or {})
    return _write(replace(lora, modules=modules, vectors=vectors, metadata=strings), out, None, dialect=to)


def merge_files(
    sources: Sequence[Source],
    out: str | Path,
    method: str = "concat",
    size: Size | None = None,
    to: Dialect | None = None,
    base: str | Path | None = None,
    **settings: float | int,
) -> Done:
    """Merge LoRA files into one; see `unbraid.files.merge`. Files of different families are refused."""
    with told(base) as ways:  # one after the other: torch has every core busy already
        loras = [read(source.path, ways=ways) for source in sources]
    names = [{**lora.modules, **dict.fromkeys(_owners(lora).values())} for lora in loras]
    family = common_family([(str(s.path), lora.family, n) for s, lora, n in zip(sources, loras, names, strict=True)])
    kept, bundled = merged_metadata([lora.metadata for lora in loras]), _bundled(loras)
    parts = [scaled(lora, source.blocks) for lora, source in zip(loras, sources, strict=True)]
    modules, vectors = [one for one, _ in parts], _summed([one for _, one in parts], sources, method)
    errors = {f"{i} {name}": error for i, lora in enumerate(loras) for name, error in lora.errors.items()}
    titles = [_title(lora, source.path) for lora, source in zip(loras, sources, strict=True)]
    del loras
    merged = []
    for one in merge(modules, [source.weight for source in sources], method, size, None, **settings):
        merged.append(one)
        for lora in modules:
            lora.pop(one.name, None)  # its memory serves the modules to come
    recipe = {
        "method": method,
        "loras": [{"name": s.path.stem, "weight": s.weight, "blocks": list(s.blocks)} for s in sources],
        "settings": settings,
    }
    strings = {
        "unbraid.recipe": json.dumps(recipe),
        "modelspec.merged_from": ", ".join(titles),
        "modelspec.title": Path(out).stem,
    }
    lora = LoraFile(_modules(merged), kept | strings, family, bundled, vectors, errors)
    return _write(lora, out, _dtype(merged), _kept(merged), to)


def scaled(
    lora: LoraFile, rules: Sequence[str] = (), strength: float = 1.0
) -> tuple[dict[str, Lora], dict[str, Tensor]]:
    """A LoRA's modules with block weights, in alpha: no tensor is touched; and its vectors with them. What has weight 0 is left
    out."""
    if not isfinite(strength):
        raise UsageError(f"a strength of {strength}", "--strength", "Give a number such as 0.8.")
    owners = _owners(lora)
    named = {**lora.modules, **dict.fromkeys(owners.values())}
    weights = {name: weight * strength for name, weight in block_weights(named, rules, lora.family).items()}
    modules = {
        name: Lora(one.down, one.up, one.alpha * weights[name]) for name, one in lora.modules.items() if weights[name]
    }
    return modules, {key: lora.vectors[key] * weights[owner] for key, owner in owners.items() if weights[owner]}


def _owners(lora: LoraFile) -> dict[str, str]:
    """Vector → its module."""
    return {key: key.rpartition(".")[0] for key in lora.vectors}


@contextmanager
def told(base: str | Path | None, rank: int | None = None) -> Iterator[Ways]:
    """To read what is no LoRA as well as one can be, and say how well; `base`: where DoRA's weights are."""
    limit = max(LIMIT, rank or 0)
    if base is None:
        yield Ways(limit, strict=False)
        return
    with opened_checkpoint(base) as checkpoint:
        yield Ways(limit, checkpoint.module_weight, strict=False)


def _summed(vectors: Sequence[Mapping[str, Tensor]], sources: Sequence[Source], method: str) -> dict[str, Tensor]:
    """Changes of norms and biases, at their LoRA's weight."""
    total: dict[str, Tensor] = {}
    for source, mine in zip(sources, vectors, strict=True):
        if mine and method != "concat":
            fix = "Leave --method out."
            raise UsageError("changes of norms and biases are merged only with concat", source.path, fix)
        for key, tensor in mine.items():
            if key in total and total[key].shape != tensor.shape:
                raise UsageError("the LoRAs' shapes differ", key, "They were made for different base models.")
            total[key] = wide(tensor) * source.weight + total.get(key, 0)
    return total


def _write(
    lora: LoraFile,
    out: str | Path,
    dtype: torch.dtype | None,
    kept: tuple[float, float] = (1.0, 1.0),
    dialect: Dialect | None = None,
) -> Done:
    modules, dialect = (
        lora.modules,
        dialect or dialect_for({**lora.modules, **dict.fromkeys(_owners(lora).values())}, lora.family),
    )
    write(
        out,
        modules,
        family=lora.family,
        dialect=dialect,
        metadata=lora.metadata,
        dtype=dtype,
        bundled=lora.bundled,
        vectors=lora.vectors,
    )
    ranks = [len(one.down) for one in modules.values()] or [0]
    densified = (len(lora.errors), max(lora.errors.values(), default=0.0))
    size = (min(ranks), max(ranks))
    return Done(Path(out), len(modules), size, kept, lora.family, tuple(lora.bundled), len(lora.vectors), densified)


def _bundled(loras: Iterable[LoraFile]) -> dict[str, Tensor]:
    """The embeddings of all. Errors: two under one name."""
    out: dict[str, Tensor] = {}
    for lora in loras:
        for key, tensor in lora.bundled.items():
            if key in out and not torch.equal(out[key], tensor):
                raise UsageError("two LoRAs bring different embeddings of one name", key, "Rename one of them.")
            out[key] = tensor
    return out


def _modules(merged: Sequence[Merged]) -> dict[str, Lora]:
    return {one.name: one.lora for one in merged}


def _kept(merged: Sequence[Merged]) -> tuple[float, float]:
    return mean(one.kept for one in merged), min(one.kept for one in merged)


def _dtype(merged: Sequence[Merged]) -> torch.dtype:
    return merged[0].lora.up.dtype


def _title(lora: LoraFile, path: Path) -> str:
    return (lora.metadata.get("modelspec.title") or lora.metadata.get("ss_output_name") or path.stem).replace(",", " ")
