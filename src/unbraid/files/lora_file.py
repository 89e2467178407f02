"""LoRA files: reads every dialect, writes kohya's or diffusers'. Lossless; each file is checked after it is saved, and never half-written.

    lora = read("style.safetensors")            # LoraFile(modules, metadata, family)
    write("out.safetensors", lora.modules, family=lora.family)

A module's change is alpha / r · up @ down. Two things differ from other tools. Reading uses every module's own alpha, where diffusers
assumes that all are equal. Writing uses one alpha for the whole file, so that all tools compute the same.
"""

from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.files.changes import STRICT, Conversion, as_lora
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.encode import Dialect, encode, vector_tensors
from unbraid.files.formats.fused import fuse, split
from unbraid.files.formats.header import (
    catalogue,
    read_header,
)
from unbraid.files.formats.metadata import data_hash, stamp
from unbraid.files.formats.weights import bits
from unbraid.files.opened import opened_lora

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in memory: module name → factors, the file's metadata, and the family of its base. Modules that are in no table keep the
    names that the file gives them."""

    modules: dict[str, Lora]
    metadata: dict[str, str]
    family: Family
    bundled: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # trained embeddings: key (OneTrainer's `bundle_emb.…`) → tensor
    # changes of biases and norms: MODULE.diff_b, MODULE.w_norm, MODULE.b_norm → tensor
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)  # module that was converted → ‖ΔW − BA‖ / ‖ΔW‖


def read(path: str | Path, adapter: str | None = None, conversion: Conversion = STRICT) -> LoraFile:
    """Read a LoRA of any dialect. `adapter`: which one to read if a PEFT file holds several.

    Tensors keep the file's dtype (8-bit floats become fp16). LoHa, LoKr, full changes and DoRA are converted to factors: see
    `unbraid.files.changes`. Errors: `UsageError` for a file that is missing, is a pickle, is damaged, or holds NaN or unknown keys; and
    for what a LoRA cannot hold, unless `conversion` is not strict.
    """
    modules: dict[str, Lora] = {}
    vectors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    with opened_lora(path, adapter) as file:
        for name in file.found.modules:
            converted = as_lora(file, name, conversion)
            vectors |= {f"{name}.{part}": tensor for part, tensor in converted.vectors.items()}
            if converted.lora:
                modules |= split(name, converted.lora, file.family)
            if converted.error is not None:
                errors[name] = converted.error
        bundled = {key: file.handle.get_tensor(key) for key in file.found.ignored}
        return LoraFile(modules, dict(file.header.metadata), file.family, bundled, vectors, errors)


def write(
    path: str | Path,
    modules: Mapping[str, Lora],
    *,
    family: Family,
    dialect: Dialect = "kohya",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = torch.float16,
    vectors: Mapping[str, Tensor] | None = None,
    bundled: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a LoRA file: saved under a temporary name, read back and compared bit by bit, then renamed.

    `bundled` tensors are stored as they are; `vectors`: see `LoraFile`. `dtype=None` keeps the dtype of each tensor, except that a factor
    becomes fp32 if it must be scaled and the product would be rounded.
    Errors: `UsageError` for NaN, values too large for the dtype, a full disk, a folder that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError("LoRAs are written as .safetensors", path, f"Name it {path.with_suffix('.safetensors').name}.")
    if not modules and not vectors:
        raise UsageError("there is nothing to write: the LoRA has no modules", path)
    modules = fuse(modules, family) if dialect == "kohya" else modules
    tensors, strings = encode(modules, family, dialect, metadata or {}, dtype)
    tensors |= vector_tensors(vectors or {}, family, dialect, dtype)
    tensors |= bundled or {}
    names = {*modules, *(key.rpartition(".")[0] for key in vectors or {})}
    with atomic(path) as part:
        part.touch()
        mode = part.stat().st_mode  # safetensors creates files that only their owner may read
        save_file(tensors, part, strings)
        part.chmod(mode)
        with ThreadPoolExecutor(1) as beside:
            digest = beside.submit(data_hash, part)
            _compare(part, tensors, names)
        stamp(part, digest.result())


def _compare(path: Path, tensors: Mapping[str, Tensor], modules: Set[str]) -> None:
    """Check that the file holds these tensors bit by bit, and that its keys are read as these modules. UsageError if not."""
    header = read_header(path)
    found = catalogue(header)
    if found.unknown or found.twice or set(found.modules) != modules:
        strange = [*found.unknown, *sorted(set(found.modules) ^ modules)]
        raise UsageError(
            "the names do not survive a round trip", strange[0] if strange else path, "Please report this."
        )
    with bits(header) as stored:
        for key, tensor in tensors.items():
            if header.shapes[key] != tuple(tensor.shape) or not _same(stored(key), tensor):
                raise UsageError("reading it back gave other values", f"{path}: {key}", "Check the disk.")


def _same(stored: NDArray[np.unsignedinteger], tensor: Tensor) -> bool:
    """Compare bits, in numpy: three times as fast as torch.equal, and without a copy of the stored tensor."""
    return np.array_equal(stored, tensor.flatten().view(BITS[tensor.element_size()]).numpy().view(stored.dtype))
