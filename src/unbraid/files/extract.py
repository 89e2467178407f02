"""A LoRA out of two checkpoints: the best factors of what differs between them, layer by layer, one layer in memory at a time."""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import finite, from_dense, rescaled
from unbraid.files.checkpoint_file import DTYPES, Checkpoint, give_back, opened_checkpoint
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.encode import Dialect
from unbraid.files.formats.places import modules
from unbraid.files.lora_file import write
from unbraid.files.merge import Size

FIRST = 64  # the rank that is tried first where an energy is wanted
NOISE = 1e-6  # a change smaller than this share of the weight is fp32's rounding
Watch = Callable[[Sequence[str]], Iterator[str]]


@dataclass(frozen=True)
class Extracted:
    """What was written. `error`: ‖ΔW − BA‖ / ‖ΔW‖ over all layers; `worst`: of one layer, and which. `left`: tensors that differ too,
    and that are no linear layers or convolutions of the UNet and the text encoders: norms, biases, embeddings, the VAE."""

    path: Path
    modules: int
    ranks: tuple[int, int]
    error: float
    worst: tuple[float, str]
    left: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One layer's factors, and the squared norms of its change and of what they lack of it."""

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
    """tuned − base as a LoRA, by the SVD of every linear layer's and convolution's difference (a randomised one where the rank is small:
    Halko et al., arXiv 0909.4061). `size`: a rank, or the share of every layer's squared norm to keep, or both. `watch` sees the layers.

    Errors: files that are no checkpoints of one kind, that differ in nothing, NaN."""
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
            give_back()
        if not layers:
            raise UsageError("no layer differs between the two", f"{base}, {tuned}", "There is nothing to extract.")
        left = _left(first, second, names)
        family = _family(first)
    square, lost = (sum(getattr(layer, which) for layer in layers.values()) for which in ("square", "lost"))
    told = {
        "unbraid.extracted": json.dumps({"base": Path(base).name, "tuned": Path(tuned).name}),
        "modelspec.title": Path(out).stem,
    }
    write(out, {name: one.lora for name, one in layers.items()}, family=family, dialect=to, metadata=told, dtype=dtype)
    worst = max(((one.lost / one.square) ** 0.5, name) for name, one in layers.items())
    ranks = [len(one.lora.down) for one in layers.values()]
    return Extracted(Path(out), len(layers), (min(ranks), max(ranks)), (lost / square) ** 0.5, worst, left)


def _common(first: Checkpoint, second: Checkpoint) -> list[str]:
    """The layers, which must be the same ones in both."""
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
    if not finite(change):
        raise UsageError("NaN or infinite weights", f"{first.path}, {second.path}: {name}", "One of them is damaged.")
    return change, norm


def _layer(name: str, found: tuple[Tensor, float], size: Size, dtype: torch.dtype) -> Layer | None:
    """None: it does not differ. The change is used up."""
    change, norm = found
    matrix = change.flatten(1)
    square = float(torch.linalg.vector_norm(matrix)) ** 2
    if square <= (NOISE * norm) ** 2:
        return None
    like = Lora(change[:1], matrix[:, :1] if change.ndim == 2 else matrix[:, :1, None, None], 1.0)
    lora = rescaled(_best(name, matrix, like, size), float(size.rank or FIRST), dtype, name)  # one alpha for the file
    down, up = lora.down.flatten(1).float(), lora.up.flatten(1).float()
    lost = float(torch.linalg.vector_norm(matrix.addmm_(up, down, alpha=-lora.alpha / len(down)))) ** 2
    return Layer(lora, square, lost)


def _best(name: str, matrix: Tensor, like: Lora, size: Size) -> Lora:
    """The factors at a rank; with an energy, at the first of 64, 128, 256, … ranks that reaches it, cut to what it needs."""
    seed, small = zlib.crc32(name.encode()), min(matrix.shape)
    most = min(size.rank or small, small)
    rank = most if size.energy is None else min(FIRST, most)
    while True:
        lora, kept = from_dense(matrix, like, rank, size.energy, seed)
        if size.energy is None or kept >= size.energy * (1 - 1e-6) or rank == most:
            return lora
        rank = min(2 * rank, most)


def _left(first: Checkpoint, second: Checkpoint, names: Sequence[str]) -> tuple[str, ...]:
    """The keys of tensors that differ and are no layer of the list; those that are in one file only count."""
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
    """Integers (`position_ids`) are never tuned."""
    if any(one.header.dtypes[key] not in DTYPES for one in (first, second)):
        return True
    one, other = first.tensor(key), second.tensor(key)
    return torch.equal(one, other) if one.dtype == other.dtype else torch.equal(one.float(), other.float())


def _family(checkpoint: Checkpoint) -> Family:
    """What its LoRAs are named for: SDXL has two text encoders' worth of conditions; SD2.1's LoRAs have SD1.5's names."""
    there = checkpoint.layout
    label = "label_emb.0.0.weight" if there.ldm else "add_embedding.linear_1.weight"
    return "sdxl" if f"{there.unet}{label}" in there.shapes else "sd15"
