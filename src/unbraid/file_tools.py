"""What the commands convert, resize, edit and merge do, as functions: files in, one checked file out."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from unbraid.errors import UsageError
from unbraid.files import LoraFile, read, write
from unbraid.formats.block_weights import block_weights
from unbraid.formats.blocks import Family
from unbraid.formats.encode import Dialect, dialect_for
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


def convert(source: str | Path, out: str | Path, to: Dialect | None = None, dtype: torch.dtype | None = None) -> Done:
    """Write a LoRA in another dialect (default: the one that most tools of its family read). Lossless by default:
    a factor that must be scaled by what its dtype cannot hold exactly becomes fp32."""
    lora = read(source)
    return _write(lora.modules, out, lora.family, lora.metadata, dtype, dialect=to)


def resize(
    source: str | Path, out: str | Path, size: Size, to: Dialect | None = None, dtype: torch.dtype | None = None
) -> Done:
    """Every module at a lower rank: the best approximation, by QR and a small SVD."""
    if size == Size():
        raise UsageError("no size is given", "resize", "Give --rank N or --energy X.")
    lora = read(source)
    merged = list(merge([lora.modules], [1.0], size=size, dtype=dtype))
    told = {"unbraid.resized": json.dumps({"rank": size.rank, "energy": size.energy})}
    return _write(_modules(merged), out, lora.family, lora.metadata | told, dtype or _dtype(merged), _kept(merged), to)


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
    return _write(modules, out, lora.family, lora.metadata | dict(metadata or {}), None, dialect=to)


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
    families: set[Family] = {lora.family for lora in loras if lora.family != "unknown"}
    if len(families) > 1:
        what = f"the LoRAs are for different base models: {', '.join(sorted(families))}"
        raise UsageError(what, "merge", "Merge LoRAs of one family.")
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
    family = families.pop() if families else "unknown"
    return _write(_modules(merged), out, family, told, _dtype(merged), _kept(merged), to)


def scaled(lora: LoraFile, rules: Sequence[str] = (), strength: float = 1.0) -> dict[str, Lora]:
    """A LoRA's modules with block weights, in alpha: no tensor is touched. Modules of weight 0 are left out."""
    weights = block_weights(lora.modules, rules, lora.family)
    return {
        name: Lora(one.down, one.up, one.alpha * weights[name] * strength)
        for name, one in lora.modules.items()
        if weights[name] * strength
    }


def _write(
    modules: Mapping[str, Lora],
    out: str | Path,
    family: Family,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    kept: tuple[float, float] = (1.0, 1.0),
    dialect: Dialect | None = None,
) -> Done:
    dialect = dialect or dialect_for(modules, family)
    write(out, modules, family=family, dialect=dialect, metadata=metadata, dtype=dtype)
    ranks = [len(lora.down) for lora in modules.values()]
    return Done(Path(out), len(modules), (min(ranks), max(ranks)), kept, family)


def _modules(merged: Sequence[Merged]) -> dict[str, Lora]:
    return {one.name: one.lora for one in merged}


def _kept(merged: Sequence[Merged]) -> tuple[float, float]:
    return mean(one.kept for one in merged), min(one.kept for one in merged)


def _dtype(merged: Sequence[Merged]) -> torch.dtype:
    return merged[0].lora.up.dtype


def _title(lora: LoraFile, path: Path) -> str:
    return (lora.metadata.get("modelspec.title") or lora.metadata.get("ss_output_name") or path.stem).replace(",", " ")
