"""The commands convert, resize, edit and merge as functions. Each reads LoRA files and writes one, which is checked."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import wide
from unbraid.core.selectors import Blocks
from unbraid.files.changes import LENIENT, Conversion
from unbraid.files.checkpoint_file import opened_checkpoint
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.encode import Dialect, dialect_for
from unbraid.files.formats.lycoris import LIMIT
from unbraid.files.formats.sources import common_family, merged_metadata
from unbraid.files.lora_file import LoraFile, read, write
from unbraid.files.merge import Merged, Size, chosen_blocks, kept_by_role, merge
from unbraid.files.scaling import of_role, owners, roles_of, scaled


@dataclass(frozen=True)
class Source:
    """One LoRA of a merge: its file, its strength, and block rules (see `unbraid.files.formats.block_weights`)."""

    path: Path
    weight: float = 1.0
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What was written. `ranks`: lowest and highest. `kept`: share of the squared norm, mean and worst module. `bundled`: names of
    embeddings in the file. `vectors`: number of changes of norms and biases. `converted`: number of modules that were converted from
    another kind than LoRA, and their worst relative error. `matched`: role → the modules that a merge took for it by its blocks or roles;
    or `left out` → those that an edit left out."""

    path: Path
    modules: int
    ranks: tuple[int, int]
    kept: tuple[float, float]
    family: Family
    bundled: tuple[str, ...] = ()
    vectors: int = 0
    converted: tuple[int, float] = (0, 0.0)
    matched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def convert(
    source: str | Path,
    out: str | Path,
    to: Dialect | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> Done:
    """Write a LoRA in another dialect; by default the one that most tools for its family read. Lossless unless `dtype` is given: a factor
    becomes fp32 if scaling it would round it. LoHa, LoKr, DoRA and full changes are converted to LoRAs (see `unbraid.files.changes`).
    `base`: the checkpoint that a DoRA was trained on."""
    with lenient(base) as conversion:
        lora = read(source, conversion=conversion)
    return _write(lora, out, dtype, dialect=to)


def resize(
    source: str | Path,
    out: str | Path,
    size: Size,
    to: Dialect | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
) -> Done:
    """Write a LoRA with a lower rank per module: the best approximation, computed by QR and a small SVD."""
    if size == Size():
        raise UsageError("no size is given", "resize", "Give --rank N or --energy X.")
    with lenient(base, size.rank) as conversion:
        lora = read(source, conversion=conversion)
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
    role: str = "",
    roles: Blocks | None = None,
) -> Done:
    """Scale blocks (0 removes them), scale the whole LoRA, set metadata. Lossless, as `convert` is. `role`: leave out the layers that serve
    the other one; `roles`: those of layers, else those that are known for the base that the file was made for, or its family."""
    if roles and not role:
        raise UsageError("it counts with --lora-role alone", "--blocks", "Give --lora-role content or style, too.")
    lora = read(source, conversion=LENIENT)
    modules, vectors = scaled(lora, tuple(blocks), strength)
    lora = replace(lora, modules=modules, vectors=vectors, metadata=lora.metadata | dict(metadata or {}))
    lora, left = of_role(lora, role, roles) if role else (lora, ())
    return replace(_write(lora, out, None, dialect=to), matched={"left out": left} if left else {})


def merge_files(
    sources: Sequence[Source],
    out: str | Path,
    method: str = "concat",
    size: Size | None = None,
    to: Dialect | None = None,
    base: str | Path | None = None,
    **settings: Any,
) -> Done:
    """Merge LoRA files into one; see `unbraid.files.merge`. Files of different families are refused. For `roles` without `blocks`
    those count that are known for the base of the first file, or its family."""
    with lenient(base) as conversion:  # not in parallel: torch uses all cores already
        loras = [read(source.path, conversion=conversion) for source in sources]
    names = [{**lora.modules, **dict.fromkeys(owners(lora).values())} for lora in loras]
    family = common_family([(str(s.path), lora.family, n) for s, lora, n in zip(sources, loras, names, strict=True)])
    kept, bundled = merged_metadata([lora.metadata for lora in loras]), _bundled(loras)
    matched = chosen_blocks(names, settings["blocks"]) if "blocks" in settings else {}
    if method == "roles" and loras:
        settings = {"blocks": roles_of(loras[0], family), **settings}
        matched = kept_by_role(names, settings["blocks"])
    parts = [scaled(lora, source.blocks) for lora, source in zip(loras, sources, strict=True)]
    modules, vectors = [one for one, _ in parts], _summed([one for _, one in parts], sources, method)
    errors = {f"{i} {name}": error for i, lora in enumerate(loras) for name, error in lora.errors.items()}
    titles = [_title(lora, source.path) for lora, source in zip(loras, sources, strict=True)]
    del loras
    merged = []
    for one in merge(modules, [source.weight for source in sources], method, size, None, **settings):
        merged.append(one)
        for lora in modules:
            lora.pop(one.name, None)  # frees memory for the next modules
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
    return replace(_write(lora, out, _dtype(merged), _kept(merged), to), matched=matched)


@contextmanager
def lenient(base: str | Path | None, rank: int | None = None) -> Iterator[Conversion]:
    """A conversion that approximates what is not exactly a LoRA, and reports the error. `base`: the checkpoint of a DoRA."""
    limit = max(LIMIT, rank or 0)
    if base is None:
        yield Conversion(limit, strict=False)
        return
    with opened_checkpoint(base) as checkpoint:
        yield Conversion(limit, checkpoint.module_weight, strict=False)


def _summed(vectors: Sequence[Mapping[str, Tensor]], sources: Sequence[Source], method: str) -> dict[str, Tensor]:
    """The sum of the changes of norms and biases, each times its LoRA's weight. UsageError for other methods than concat."""
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
        dialect or dialect_for({**lora.modules, **dict.fromkeys(owners(lora).values())}, lora.family),
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
    converted = (len(lora.errors), max(lora.errors.values(), default=0.0))
    size = (min(ranks), max(ranks))
    return Done(Path(out), len(modules), size, kept, lora.family, tuple(lora.bundled), len(lora.vectors), converted)


def _bundled(loras: Iterable[LoraFile]) -> dict[str, Tensor]:
    """The embeddings of all LoRAs. Errors: two different ones with the same name."""
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
