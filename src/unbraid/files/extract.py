"""Extracting a LoRA from two checkpoints: the best low-rank factors of their difference. One layer at a time is in memory."""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import from_dense, rescaled
from unbraid.files.checkpoint_file import DTYPES, Checkpoint, opened_checkpoint
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.encode import Dialect
from unbraid.files.formats.places import modules
from unbraid.files.lora_file import write
from unbraid.files.merge import Size

FIRST = 64  # the rank that is tried first if a share of the energy is wanted
NOISE = 1e-6  # a smaller change, relative to the weight, is taken for fp32's rounding
Watch = Callable[[Sequence[str]], Iterator[str]]


@dataclass(frozen=True)
class Extracted:
    """What was written. `error`: ‖ΔW − BA‖ / ‖ΔW‖ over all layers; `worst`: the largest of one layer, and its name. `left`: tensors that also
    differ but cannot be in a LoRA, such as norms, biases, embeddings and the VAE."""

    path: Path
    modules: int
    ranks: tuple[int, int]
    error: float
    worst: tuple[float, str]
    left: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One layer's factors; `square`: the squared norm of its change; `lost`: the squared norm of the part that the factors lack."""

    lora: Lora
    square: float
    lost: float


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    size: Size,
    *,
    to: Dialect = "kohya",
    dtype: torch.dtype | None = None,
    watch: Watch = iter,
) -> Extracted:
    """Write tuned − base as a LoRA, from the SVD of the difference of every linear layer and convolution (randomised if the rank is small:
    Halko et al., arXiv 0909.4061). `size`: a rank, or the share of every layer's squared norm to keep, or both. `watch` iterates over the
    names of the layers, for a progress bar.

    Errors: files that are not checkpoints of one kind, checkpoints without any difference, NaN."""
    dtype = dtype or torch.float16
    if size == Size():
        raise UsageError("no size is given", "extract", "Give --rank N or --energy X.")
    with opened_checkpoint(base) as first, opened_checkpoint(tuned) as second:
        names = _common(first, second)
        layers: dict[str, Layer] = {}
        for name in watch(names):
            layer = _layer(name, _difference(name, first, second), size, dtype)
            if layer:
                layers[name] = layer
        if not layers:
            raise UsageError("no layer differs between the two", f"{base}, {tuned}", "There is nothing to extract.")
        left = _left(first, second, names)
        family = _family(first)
    square, lost = (sum(getattr(layer, which) for layer in layers.values()) for which in ("square", "lost"))
    metadata = {
        "unbraid.extracted": json.dumps({"base": Path(base).name, "tuned": Path(tuned).name}),
        "modelspec.title": Path(out).stem,
    }
    write(
        out, {name: one.lora for name, one in layers.items()}, family=family, dialect=to, metadata=metadata, dtype=dtype
    )
    worst = max(((one.lost / one.square) ** 0.5, name) for name, one in layers.items())
    ranks = [len(one.lora.down) for one in layers.values()]
    return Extracted(Path(out), len(layers), (min(ranks), max(ranks)), (lost / square) ** 0.5, worst, left)


def _common(first: Checkpoint, second: Checkpoint) -> list[str]:
    """The names of the layers. UsageError if the two checkpoints have different ones."""
    names, others = list(modules(first.layout)), set(modules(second.layout))
    strange = [name for name in names if name not in others] + sorted(others - set(names))
    if strange:
        what = f"{len(strange)} layers are in one of the checkpoints only, such as {strange[0]}"
        raise UsageError(what, f"{first.path}, {second.path}", "Give two checkpoints of one model.")
    return names


def _difference(name: str, first: Checkpoint, second: Checkpoint) -> tuple[Tensor, float]:
    """tuned − base in fp32, `[d, k, …]`, and the norm of the base's weight."""
    before, after = first.module_weight(name), second.module_weight(name)
    if before.shape != after.shape:
        what = f"{tuple(before.shape)} in the one, {tuple(after.shape)} in the other"
        raise UsageError(what, name, "Give two checkpoints of one model.")
    norm = float(torch.linalg.vector_norm(before))
    change = after.sub_(before)
    if not bool(torch.isfinite(change).all()):
        raise UsageError("NaN or infinite weights", f"{first.path}, {second.path}: {name}", "One of them is damaged.")
    return change, norm


def _layer(name: str, found: tuple[Tensor, float], size: Size, dtype: torch.dtype) -> Layer | None:
    """The factors of a layer's change; None if there is none."""
    change, norm = found
    matrix = change.flatten(1)
    square = float(torch.linalg.vector_norm(matrix)) ** 2
    if square <= (NOISE * norm) ** 2:
        return None
    like = Lora(change[:1], matrix[:, :1] if change.ndim == 2 else matrix[:, :1, None, None], 1.0)
    lora = rescaled(
        _best(name, matrix, like, size), float(size.rank or FIRST), dtype, name
    )  # all layers get the same alpha
    down, up = lora.down.flatten(1).float(), lora.up.flatten(1).float()
    lost = float(torch.linalg.vector_norm(matrix.addmm(up, down, alpha=-lora.alpha / len(down)))) ** 2
    return Layer(lora, square, lost)


def _best(name: str, matrix: Tensor, like: Lora, size: Size) -> Lora:
    """The factors at a given rank. If an energy is given: tries the ranks 64, 128, 256, … until it is reached, then uses the lowest rank
    that reaches it."""
    seed, small = zlib.crc32(name.encode()), min(matrix.shape)
    most = min(size.rank or small, small)
    rank = most if size.energy is None else min(FIRST, most)
    while True:
        lora, kept = from_dense(matrix, like, rank, size.energy, seed)
        if size.energy is None or kept >= size.energy * (1 - 1e-6) or rank == most:
            return lora
        rank = min(2 * rank, most)


def _left(first: Checkpoint, second: Checkpoint, names: Sequence[str]) -> tuple[str, ...]:
    """The keys of `first` that belong to none of these layers and differ, or are missing, in `second`."""
    covered = {place.key for name in names if (place := first.place(name))}
    out = []
    for key in first.table:
        if key in covered:
            continue
        if (
            key not in second.table
            or first.header.shapes[key] != second.header.shapes[key]
            or not _same(first, second, key)
        ):
            out.append(key)
    return tuple(out)


def _same(first: Checkpoint, second: Checkpoint, key: str) -> bool:
    """Whether a tensor is equal in both. Integers such as `position_ids` are not compared, because they are never trained."""
    if any(one.header.dtypes[key] not in DTYPES for one in (first, second)):
        return True
    one, other = first.tensor(key), second.tensor(key)
    return torch.equal(one, other) if one.dtype == other.dtype else torch.equal(one.float(), other.float())


def _family(checkpoint: Checkpoint) -> Family:
    """The family whose names the LoRA gets. SDXL is recognised by its additional embedding; SD2.1's LoRAs have the same names as SD1.5's."""
    there = checkpoint.layout
    label = "label_emb.0.0.weight" if there.ldm else "add_embedding.linear_1.weight"
    return "sdxl" if f"{there.unet}{label}" in there.shapes else "sd15"
