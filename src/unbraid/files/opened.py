"""An open LoRA file, whose modules are read one at a time."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import exact_dense, finite, fold_mid
from unbraid.files.formats import lycoris
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.gate import check_module
from unbraid.files.formats.header import (
    Catalogue,
    Header,
    adapter_metadata,
    catalogue,
    check_readable,
    opened,
    read_header,
)
from unbraid.files.formats.patterns import alpha_of
from unbraid.files.formats.weights import FLOATS, READABLE

LARGEST = 1e15  # its square still fits into fp32


@dataclass(frozen=True)
class Opened:
    """An open LoRA file. `settings`: PEFT's adapter settings, if it has any."""

    header: Header
    found: Catalogue
    family: Family
    handle: Any
    settings: Mapping[str, Any]

    def parts(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], float | None]:
        """A module's tensors by part: those of the weight's change; those that change biases and norms; and alpha, None if the file has none."""
        keys, where = dict(self.found.modules[name]), self.where(name)
        key = keys.pop("alpha", None)
        alpha = None if key is None else _number(self.handle, self.header, key)
        parts, vectors = lycoris.sorted_out(
            {part: _tensor(self.handle, self.header, key) for part, key in keys.items()}
        )
        if lycoris.is_kind(parts):
            _sane(parts.values(), 1.0 if alpha is None else alpha, where)
        for vector in (*vectors.values(), *(parts[part] for part in parts if part == "dora_scale")):
            _sane([vector], 1.0, where)
        return parts, vectors, alpha

    def plain(self, parts: Mapping[str, Tensor], alpha: float | None, name: str) -> Lora:
        """A plain LoRA module, stored as `down` and `up` or as ziplora-pytorch's dense matrix. Without an alpha, the settings' is used."""
        lora = _lora(parts, self.where(name))
        alpha = alpha_of(self.settings, name, len(lora.down)) if alpha is None else alpha
        _sane([lora.down, lora.up], alpha, self.where(name))
        return Lora(lora.down, lora.up, alpha)

    def where(self, name: str) -> str:
        return f"{self.header.path}: {name}"


@contextmanager
def opened_lora(path: str | Path, adapter: str | None = None) -> Iterator[Opened]:
    """Open a LoRA file. Errors: `UsageError` for a file that is missing, is a pickle, is damaged, or has unknown keys."""
    header = read_header(Path(path))
    found = catalogue(header, adapter)
    check_readable(header, found)
    for name, parts in found.modules.items():
        check_module(
            {part: header.shapes[key] for part, key in parts.items() if part != "alpha"}, f"{header.path}: {name}"
        )
    with opened(header.path, "pt") as handle:
        yield Opened(header, found, found.verdict.family, handle, adapter_metadata(header))


def _tensor(handle: Any, header: Header, key: str) -> Tensor:
    if header.dtypes[key] not in FLOATS:
        what = f"{header.dtypes[key]} numbers are not read"
        raise UsageError(what, f"{header.path}: {key}", "Save it as fp16 or fp32.")
    tensor = handle.get_tensor(key)
    if header.dtypes[key].startswith("F8"):
        tensor = tensor.to(torch.float16)
    if not finite(tensor):
        raise UsageError(
            "NaN or infinite weights", f"{header.path}: {key}", "The training diverged; this file is of no use."
        )
    return tensor


def _lora(tensors: Mapping[str, Tensor], where: str) -> Lora:
    """The factors of one module, with alpha = r. `check_module` has checked the shapes."""
    if "dense" in tensors:
        return exact_dense(tensors["dense"], where)
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    if mid is not None:
        down = fold_mid(down, mid)
    return Lora(down, up, float(len(down)))


def _sane(tensors: Iterable[Tensor], alpha: float, where: str) -> None:
    """UsageError if the product of a change's tensors and its alpha could overflow."""
    sizes = [*(float(tensor.abs().max()) for tensor in tensors), abs(alpha)]
    if max(sizes) > LARGEST or prod(sizes) > LARGEST:
        raise UsageError(
            "weights so large that products overflow", where, "The file is damaged, or its training diverged."
        )


def _number(handle: Any, header: Header, key: str) -> float:
    """The value of an alpha, which may have any numeric dtype. UsageError for anything but one finite number."""
    where = f"{header.path}: {key}"
    if header.shapes[key].count(1) != len(header.shapes[key]):
        raise UsageError("alpha is not one number", where, "The file is damaged.")
    if header.dtypes[key] not in READABLE:
        raise UsageError(f"{header.dtypes[key]} is no type of an alpha", where, "The file is damaged.")
    alpha = float(handle.get_tensor(key).flatten()[0])
    if not isfinite(alpha):
        raise UsageError("alpha is not finite", where, "The file is damaged.")
    return alpha
