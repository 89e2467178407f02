"""What a LoRA file changes, module by module: as factors, or as the dense change of a weight.

LoRA and LoCon are factors as they are. LoHa and LoKr are exactly low-rank where their factors are small. What has a higher rank than
`Ways.limit`, a full change (`diff`), and DoRA (which needs its base's weights) are cut there, and the error is told.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import matrices, wide
from unbraid.files.formats import lycoris
from unbraid.files.opened import Opened

EXACT = 1e-3  # a relative error that is no more than fp16's rounding


@dataclass(frozen=True)
class Ways:
    """How what is not a plain LoRA is read. `limit`: the highest rank it is given. `weight`: module → the weight of the base, for
    DoRA. `strict`: vectors, and errors above fp16's rounding, are refused instead of told."""

    limit: int = lycoris.LIMIT
    weight: Callable[[str], Tensor] | None = None
    strict: bool = True


STRICT, TOLD = Ways(), Ways(strict=False)


@dataclass(frozen=True)
class Taken:
    """A module: its factors (None: there are only vectors), the changes of its bias and its norm, and the factors' relative error
    (None: they are the file's own)."""

    lora: Lora | None
    vectors: Mapping[str, Tensor]
    error: float | None = None


def take(file: Opened, name: str, ways: Ways) -> Taken:
    """A module as a LoRA."""
    parts, vectors, alpha = file.parts(name)
    where = file.where(name)
    if vectors and ways.strict:
        fix = "merge, convert, resize and edit keep it; bake puts it into a checkpoint."
        raise UsageError(f"norms and biases ({', '.join(vectors)}) are changed, which no LoRA does", where, fix)
    if not parts:
        return Taken(None, vectors)
    if "dora_scale" in parts:
        if ways.weight is None:
            fix = (
                "Name the model that it was trained on (convert, resize, merge: --base FILE), or bake it into that one."
            )
            raise UsageError("DoRA needs the weights of its base", where, fix)
        lora, error = lycoris.factored(change(file, name, ways.weight(name)), ways.limit)
    elif lycoris.is_kind(parts):
        told, kernel = lycoris.alpha_of(file.settings, alpha, name), lycoris.kernel_of(name, file.family)
        lora, error = lycoris.low_rank(parts, told, kernel, ways.limit, where)
    else:
        return Taken(file.plain(parts, alpha, name), vectors)
    if ways.strict and error > EXACT:
        what = f"a LoRA of rank {ways.limit} is off by {error:.1%}"
        raise UsageError(what, where, "Make one with unbraid convert, or resize --rank N, and see whether it will do.")
    return Taken(lora, vectors, error)


def change(file: Opened, name: str, weight: Tensor) -> Tensor:
    """The dense change of a weight `[d, k, …]`, in fp32 and its shape; of DoRA, that of this weight."""
    zero = torch.zeros(weight.shape)
    add_change(file, name, zero, 1.0, weight)
    return zero


def add_change(file: Opened, name: str, total: Tensor, strength: float, weight: Tensor) -> None:
    """total += strength · change, in place; both are fp32 or fp64, `[d, k, …]`. `weight`: what DoRA is the change of."""
    parts, _, alpha = file.parts(name)
    magnitude, where = parts.pop("dora_scale", None), file.where(name)
    if magnitude is not None:
        own = torch.zeros(weight.shape, dtype=total.dtype)
        _add(file, name, parts, alpha, own, 1.0)
        total.add_(lycoris.decomposed(wide(weight), own, magnitude, where), alpha=strength)
    else:
        _add(file, name, parts, alpha, total, strength)


def _add(file: Opened, name: str, parts: lycoris.Parts, alpha: float | None, total: Tensor, strength: float) -> None:
    where = file.where(name)
    if lycoris.is_kind(parts):
        told = lycoris.alpha_of(file.settings, alpha, name)
        total.add_(lycoris.dense(parts, told, total.shape, where), alpha=strength)
        return
    lora = file.plain(parts, alpha, name)
    down, up = matrices(lora)
    if len(up) != len(total) or down.shape[1] != total[0].numel():
        what = f"a change of {(len(up), down.shape[1])} does not fit a weight of {tuple(total.shape)}"
        raise UsageError(what, where, "It was made for another base model.")
    flat = total.flatten(1) if total.ndim == 2 else total.view(len(total), -1)  # never a copy: this is in place
    flat.addmm_(up.to(flat), down.to(flat), alpha=strength * lora.alpha / len(down))
