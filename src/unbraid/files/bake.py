"""Merging LoRAs into a checkpoint: W + Σ w ΔW for each tensor. Names, order and dtypes stay those of the checkpoint."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError
from unbraid.core.lowrank import wide
from unbraid.files.changes import add_change
from unbraid.files.checkpoint_file import Checkpoint, copy_changed, opened_checkpoint, part_of
from unbraid.files.formats.block_weights import block_weights
from unbraid.files.formats.kinds import VECTORS
from unbraid.files.formats.places import Place
from unbraid.files.opened import Opened, opened_lora
from unbraid.files.tools import Source

LEAF = {"diff_b": "bias", "b_norm": "bias", "w_norm": "weight"}
Watch = Callable[[Iterator[int], int], Iterator[int]]


@dataclass(frozen=True)
class Baked:
    """What was written. `tensors`: number in the checkpoint; `changed`: how many of them changed; `modules`: LoRA modules that were applied."""

    path: Path
    tensors: int
    changed: int
    modules: int


@dataclass(frozen=True)
class Use:
    """A LoRA module applied to a tensor of the checkpoint. `place`: the tensor, or the part of it that belongs to the module. `part`: the
    name of a vector that is added, or "" for the change of the weight."""

    lora: Opened
    module: str
    weight: float
    place: Place
    part: str = ""

    @property
    def decomposed(self) -> bool:
        return "dora_scale" in self.lora.found.modules[self.module]


def bake(
    checkpoint: str | Path, sources: Sequence[Source], out: str | Path, watch: Watch = lambda steps, total: steps
) -> Baked:
    """Merge LoRAs into a single-file checkpoint of SDXL, SD1.5 or SD2.1, or into a diffusers UNet file.

    Every kind of module that `unbraid.files.changes` knows is applied exactly; DoRA uses this checkpoint's weights. `watch(steps, total)`
    iterates over the bytes written per tensor, for a progress bar. Errors: modules that the checkpoint lacks, shapes that do not fit, a
    full disk; then nothing is written.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        fix = f"Name it {out.with_suffix('.safetensors').name}."
        raise UsageError("checkpoints are written as .safetensors", out, fix)
    if not sources:
        raise UsageError("there is no LoRA to bake", "bake", "Give one or more: lora.safetensors:0.8.")
    if out.exists() and any(
        out.samefile(path) for path in (checkpoint, *(s.path for s in sources)) if Path(path).exists()
    ):
        raise UsageError("it would replace what it is made of", out, "Choose another --out.")
    with ExitStack() as stack:
        base = stack.enter_context(opened_checkpoint(checkpoint))
        loras = [stack.enter_context(opened_lora(source.path)) for source in sources]
        plan, modules = _plan(base, loras, sources)
        total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in base.table.values())
        _check_room(out, base.start + total)
        changed = {key: partial(_changed, key, uses) for key, uses in plan.items()}
        with atomic(out) as part:
            for _ in watch(copy_changed(base, part, _metadata(base, sources), changed), total):
                pass
        return Baked(out, len(base.table), len(plan), modules)


def _plan(base: Checkpoint, loras: Sequence[Opened], sources: Sequence[Source]) -> tuple[dict[str, list[Use]], int]:
    """Key of a tensor → the LoRA modules to apply to it; and the number of modules that are applied at all."""
    plan: dict[str, list[Use]] = {}
    modules = 0
    for lora, source in zip(loras, sources, strict=True):
        weights = block_weights(lora.found.modules, source.blocks, lora.family)
        missing = []
        for module, parts in lora.found.modules.items():
            weight = weights[module] * source.weight
            uses = list(_uses(base, lora, module, parts, weight)) if weight else []
            missing += [module] if None in uses else []
            for use in uses:
                if use:
                    plan.setdefault(use.place.key, []).append(use)
            modules += bool(uses)
        if missing:
            what = (
                f"{len(missing)} of its {len(lora.found.modules)} modules are not in the checkpoint: {_some(missing)}"
            )
            fix = "Is it for another base model? To leave out text encoders: FILE:WEIGHT:text_encoder=0."
            raise UsageError(what, lora.header.path, fix)
    return plan, modules


def _uses(base: Checkpoint, lora: Opened, module: str, parts: Mapping[str, str], weight: float) -> Iterator[Use | None]:
    """Where the parts of a module go. None stands for a part that the checkpoint has no tensor for."""
    norm = "diff" in parts and len(lora.header.shapes[parts["diff"]]) == 1
    vectors = [part for part in VECTORS if part in parts] + (["w_norm"] if norm else [])
    if set(parts) - {*VECTORS, "alpha"} - ({"diff"} if norm else set()):
        there = base.place(module)
        yield Use(lora, module, weight, there) if there else None
    for part in vectors:
        there = base.place(module, LEAF[part])
        yield Use(lora, module, weight, there, part) if there else None


def _changed(key: str, uses: Sequence[Use], stored: Tensor) -> Tensor:
    """W + Σ w ΔW in fp32. DoRA's change is computed from the stored W, not from the sum so far."""
    total = wide(stored)
    original = total.clone() if len(uses) > 1 and any(use.decomposed for use in uses) else total
    for use in uses:
        mine = part_of(total, use.place)
        if use.part:
            mine.add_(_vector(use, mine, key), alpha=use.weight)
        else:
            add_change(use.lora, use.module, mine, use.weight, part_of(original, use.place))
    return total


def _vector(use: Use, mine: Tensor, key: str) -> Tensor:
    vector = use.lora.parts(use.module)[1][use.part]
    if vector.shape != mine.shape:
        what = f"a change of {tuple(vector.shape)} does not fit {key}, {tuple(mine.shape)}"
        raise UsageError(what, use.lora.where(use.module), "It was made for another base model.")
    return wide(vector)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _metadata(base: Checkpoint, sources: Sequence[Source]) -> dict[str, str]:
    """The checkpoint's metadata without its hashes, which no longer fit, and a list of the LoRAs that were merged."""
    kept = {key: value for key, value in base.header.metadata.items() if "hash" not in key.lower()}
    loras = [{"name": s.path.stem, "weight": s.weight, "blocks": list(s.blocks)} for s in sources]
    return {**kept, "unbraid.baked": json.dumps(loras)}


def _check_room(out: Path, size: int) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        what = f"{size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
        raise UsageError(what, folder, "Choose another folder or make room.")
