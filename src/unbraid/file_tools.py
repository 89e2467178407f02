"""What the commands convert, resize, edit and merge do, as functions: files in, one checked file out."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from unbraid.errors import UsageError
from unbraid.files import LoraFile, read, write
from unbraid.formats.block_weights import block_weights
from unbraid.formats.blocks import Family
from unbraid.formats.encode import Dialect, dialect_for
from unbraid.formats.sources import common_family, merged_metadata
from unbraid.lora import Lora
from unbraid.merge import Merged, Size, merge


@dataclass(frozen=True)
class Source:
    """One LoRA of a merge: its file, its strength, and block rules (see `unbraid.formats.block_weights`)."""

    path: Path
    weight: float = 1.0
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What was written: modules, the ranks' range, and the share of the squared norm kept (mean, worst)."""

    path: Path
    modules: int
    ranks: tuple[int, int]
    kept: tuple[float, float]
    family: Family
    bundled: tuple[str, ...] = ()  # embeddings that came along


def convert(source: str | Path, out: str | Path, to: Dialect | None = None, dtype: torch.dtype | None = None) -> Done:
    """Write a LoRA in another dialect (default: the one that most tools of its family read). Lossless by default:
    a factor that must be scaled by what its dtype cannot hold exactly becomes fp32."""
    lora = read(source)
    return _write(lora, out, dtype, dialect=to)


def resize(
    source: str | Path, out: str | Path, size: Size, to: Dialect | None = None, dtype: torch.dtype | None = None
) -> Done:
    """Every module at a lower rank: the best approximation, by QR and a small SVD."""
    if size == Size():
        raise UsageError("no size is given", "resize", "Give --rank N or --energy X.")
    lora = read(source)
    merged = list(merge([lora.modules], [1.0], size=size, dtype=dtype))
    told = {"unbraid.resized": json.dumps({"rank": size.rank, "energy": size.energy})}
    small = replace(lora, modules=_modules(merged), metadata=lora.metadata | told)
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
    lora = read(source)
    modules = scaled(lora, tuple(blocks), strength)
    return _write(replace(lora, modules=modules, metadata=lora.metadata | dict(metadata or {})), out, None, dialect=to)


def merge_files(
    sources: Sequence[Source],
    out: str | Path,
    method: str = "concat",
    size: Size | None = None,
    to: Dialect | None = None,
    **settings: float | int,
) -> Done:
    """Merge LoRA files into one; see `unbraid.merge`. Files of different families are refused."""
    loras = [read(source.path) for source in sources]  # one after the other: torch has every core busy already
    family = common_family([(str(s.path), lora.family, lora.modules) for s, lora in zip(sources, loras, strict=True)])
    kept, bundled = merged_metadata([lora.metadata for lora in loras]), _bundled(loras)
    modules = [scaled(lora, source.blocks) for lora, source in zip(loras, sources, strict=True)]
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
    told = {
        "unbraid.recipe": json.dumps(recipe),
        "modelspec.merged_from": ", ".join(titles),
        "modelspec.title": Path(out).stem,
    }
    lora = LoraFile(_modules(merged), kept | told, family, bundled)
    return _write(lora, out, _dtype(merged), _kept(merged), to)


def scaled(lora: LoraFile, rules: Sequence[str] = (), strength: float = 1.0) -> dict[str, Lora]:
    """A LoRA's modules with block weights, in alpha: no tensor is touched. Modules of weight 0 are left out."""
    if not isfinite(strength):
        raise UsageError(f"a strength of {strength}", "--strength", "Give a number such as 0.8.")
    weights = block_weights(lora.modules, rules, lora.family)
    return {
        name: Lora(one.down, one.up, one.alpha * weights[name] * strength)
        for name, one in lora.modules.items()
        if weights[name] * strength
    }


def _write(
    lora: LoraFile,
    out: str | Path,
    dtype: torch.dtype | None,
    kept: tuple[float, float] = (1.0, 1.0),
    dialect: Dialect | None = None,
) -> Done:
    modules, dialect = lora.modules, dialect or dialect_for(lora.modules, lora.family)
    write(
        out,
        modules,
        family=lora.family,
        dialect=dialect,
        metadata=lora.metadata,
        dtype=dtype,
        bundled=lora.bundled,
    )
    ranks = [len(one.down) for one in modules.values()]
    return Done(Path(out), len(modules), (min(ranks), max(ranks)), kept, lora.family, tuple(lora.bundled))


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
