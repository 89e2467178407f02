"""The change that a LoRA file makes to a module: as the two factors of a LoRA, or as the dense change of the weight.

LoRA and LoCon modules hold the factors. LoHa and LoKr convert to factors exactly if their rank is small enough. Those of a rank above
`Conversion.limit`, full changes (`diff`) and DoRA (which needs its base's weights) are approximated at that rank, and the error is
reported.
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

EXACT = 1e-3  # relative error that counts as exact: about fp16's rounding


@dataclass(frozen=True)
class Conversion:
    """How modules that are not plain LoRAs are converted. `limit`: the highest rank of the result. `weight`: module → the base's weight,
    needed for DoRA. `strict`: raise UsageError for changes of norms and biases, and for errors above `EXACT`, instead of returning them."""

    limit: int = lycoris.LIMIT
    weight: Callable[[str], Tensor] | None = None
    strict: bool = True


STRICT, LENIENT = Conversion(), Conversion(strict=False)


@dataclass(frozen=True)
class Converted:
    """One module as a LoRA. `lora` is None if the module only changes norms and biases, which are in `vectors`. `error`: relative error
    of the conversion; None if the module was a plain LoRA."""

    lora: Lora | None
    vectors: Mapping[str, Tensor]
    error: float | None = None


def as_lora(file: Opened, name: str, conversion: Conversion) -> Converted:
    """Read one module and convert it to a LoRA. Errors: see `Conversion`; DoRA without its base; tensors that do not fit."""
    parts, vectors, alpha = file.parts(name)
    where = file.where(name)
    if vectors and conversion.strict:
        fix = "merge, convert, resize and edit keep it; bake puts it into a checkpoint."
        raise UsageError(f"norms and biases ({', '.join(vectors)}) are changed, which no LoRA does", where, fix)
    if not parts:
        return Converted(None, vectors)
    if "dora_scale" in parts:
        if conversion.weight is None:
            fix = (
                "Name the model that it was trained on (convert, resize, merge: --base FILE), or bake it into that one."
            )
            raise UsageError("DoRA needs the weights of its base", where, fix)
        lora, error = lycoris.factored(change(file, name, conversion.weight(name)), conversion.limit)
    elif lycoris.is_kind(parts):
        scale, kernel = lycoris.alpha_of(file.settings, alpha, name), lycoris.kernel_of(name, file.family)
        lora, error = lycoris.low_rank(parts, scale, kernel, conversion.limit, where)
    else:
        return Converted(file.plain(parts, alpha, name), vectors)
    if conversion.strict and error > EXACT:
        what = f"a LoRA of rank {conversion.limit} is off by {error:.1%}"
        raise UsageError(what, where, "Make one with unbraid convert, or resize --rank N, and see whether it will do.")
    return Converted(lora, vectors, error)


def change(file: Opened, name: str, weight: Tensor) -> Tensor:
    """The dense change of a weight `[d, k, …]`, in fp32 and in its shape. DoRA's change depends on the weight's values."""
    zero = torch.zeros(weight.shape)
    add_change(file, name, zero, 1.0, weight)
    return zero


def add_change(file: Opened, name: str, total: Tensor, strength: float, weight: Tensor) -> None:
    """total += strength · change, in place. `total [d, k, …]` is fp32 or fp64; `weight`: the base's weight, which DoRA's change needs."""
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
        scale = lycoris.alpha_of(file.settings, alpha, name)
        total.add_(lycoris.dense(parts, scale, total.shape, where), alpha=strength)
        return
    lora = file.plain(parts, alpha, name)
    down, up = matrices(lora)
    if len(up) != len(total) or down.shape[1] != total[0].numel():
        what = f"a change of {(len(up), down.shape[1])} does not fit a weight of {tuple(total.shape)}"
        raise UsageError(what, where, "It was made for another base model.")
    flat = (
        total.flatten(1) if total.ndim == 2 else total.view(len(total), -1)
    )  # a view, because the sum is made in place
    flat.addmm_(up.to(flat), down.to(flat), alpha=strength * lora.alpha / len(down))
