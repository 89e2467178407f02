"""Reading a checkpoint one tensor at a time, and writing it with some tensors changed. At most one tensor is in memory."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.files.formats.header import Header, read_header
from unbraid.files.formats.places import Layout, Place, layout, place

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CHUNK = 16 << 20  # bytes
KINDS = "SDXL, SD1.5 and SD2.1 are known: single files with LDM names, and unet/diffusion_pytorch_model.safetensors."


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. `layout`: where modules are in it. `table`: key → entry of the file's header, in the order of the data."""

    header: Header
    layout: Layout
    table: Mapping[str, Any]
    start: int  # byte at which the data begin
    file: BinaryIO

    @property
    def path(self) -> Path:
        return self.header.path

    def tensor(self, key: str) -> Tensor:
        """One tensor, in its own dtype."""
        dtype = self.header.dtypes[key]
        if dtype not in DTYPES:
            fix = "Give the checkpoint in fp16, bf16 or fp32."
            raise UsageError(f"{dtype} numbers cannot be changed", f"{self.path}: {key}", fix)
        begin, end = self.table[key]["data_offsets"]
        self.file.seek(self.start + begin)
        data = torch.empty(end - begin, dtype=torch.uint8)
        rest = memoryview(data.numpy())  # type: ignore[arg-type]
        while len(rest):
            got = self.file.readinto(rest)  # type: ignore[attr-defined]
            if not got:
                raise UsageError("the file became shorter while it was read", self.path, "Get it again.")
            rest = rest[got:]
        return data.view(DTYPES[dtype]).reshape(self.header.shapes[key])

    def place(self, module: str, leaf: str = "weight") -> Place | None:
        """Where a module's weight or bias is; None if the checkpoint does not have it."""
        return place(self.layout, module, leaf)

    def module_weight(self, module: str) -> Tensor:
        """The weight `[d, k, …]` of a module, in fp32. UsageError if the checkpoint has no such module."""
        found = self.place(module)
        if not found:
            what = f"the base has no {module}"
            raise UsageError(what, self.path, "Give the checkpoint that the LoRA was trained on.")
        return part_of(self.tensor(found.key), found).float()


def part_of(tensor: Tensor, where: Place) -> Tensor:
    """The part of a tensor that belongs to one module, as a view `[d, k, …]`."""
    part = tensor if where.third is None else tensor.chunk(3)[where.third]
    return part.T if where.transposed else part


@contextmanager
def opened_checkpoint(path: str | Path) -> Iterator[Checkpoint]:
    """Open a checkpoint. Errors: `UsageError` if it is not a safetensors file, or a model with unknown names."""
    path = Path(path)
    if path.is_dir():
        fix = f"Give a file of it, such as {path / 'unet' / 'diffusion_pytorch_model.safetensors'}, or a single-file checkpoint."
        raise UsageError("this is a folder", path, fix)
    header = read_header(path)
    scaled = next((key for key in header.shapes if key.endswith(("scale_weight", "scaled_fp8", "weight_scale"))), "")
    if scaled:
        fix = "Give the checkpoint in fp16, bf16 or fp32."
        raise UsageError("its weights are scaled 8-bit numbers", f"{path}: {scaled}", fix)
    found = layout(header.shapes)
    if found.unet is None:
        raise UsageError("no UNet is found in it", path, KINDS)
    with path.open("rb", buffering=0) as file:
        size = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(size))
        table.pop("__metadata__", None)
        ordered = dict(sorted(table.items(), key=lambda item: item[1]["data_offsets"]))
        yield Checkpoint(header, found, ordered, 8 + size, file)  # type: ignore[arg-type]


def copy_changed(
    source: Checkpoint, out: Path, metadata: Mapping[str, str], changed: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[int]:
    """Write a copy of a checkpoint to `out`. A tensor whose key is in `changed` is replaced by that function's result, rounded to the
    tensor's dtype; the others are copied byte by byte. Yields the number of bytes of each tensor after it is written."""
    table = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(table | dict(source.table), ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffer = memoryview(bytearray(CHUNK))
    with out.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, entry in source.table.items():
            begin, end = entry["data_offsets"]
            if key in changed:
                tensor = _rounded(changed[key](source.tensor(key)), source, key)
                _write(file, memoryview(tensor.contiguous().view(torch.uint8).flatten().numpy()))  # type: ignore[arg-type]
            else:
                _copy(source, file, begin, end, buffer)
            yield end - begin


def _rounded(tensor: Tensor, source: Checkpoint, key: str) -> Tensor:
    dtype = DTYPES[source.header.dtypes[key]]
    most = max(abs(float(extreme)) for extreme in torch.aminmax(tensor)) if tensor.numel() else 0.0
    if not most <= torch.finfo(dtype).max:  # NaN too
        what = "the changed weights are too large for the checkpoint's dtype, or the checkpoint holds NaN"
        raise UsageError(what, f"{source.path}: {key}", "Use a lower weight.")
    return tensor.to(dtype)


def _copy(source: Checkpoint, file: Any, begin: int, end: int, buffer: memoryview) -> None:
    source.file.seek(source.start + begin)
    while begin < end:
        got = source.file.readinto(buffer[: min(len(buffer), end - begin)])  # type: ignore[attr-defined]
        if not got:
            raise UsageError("the file became shorter while it was read", source.path, "Get it again.")
        _write(file, buffer[:got])
        begin += got


def _write(file: Any, data: memoryview) -> None:
    """Write all data: an unbuffered file may accept only a part at a time."""
    while len(data):
        data = data[file.write(data) :]
