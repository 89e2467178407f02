"""Reading a LoRA file's values as numpy arrays, bf16 and 8-bit floats included, without torch."""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
from numpy.typing import NDArray

from unbraid.files.formats.header import Header
from unbraid.files.formats.names import split_key

# dtype → (integer type for its bits, mask of the exponent; if all its bits are set the value is infinite or NaN)
_BITS = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0 << 48),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),  # it has no infinity; NaN has all bits set
}
_NUMBERS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_NUMBERS |= {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "u1"}
FLOATS = frozenset(_BITS)
READABLE = FLOATS | frozenset(_NUMBERS)  # all dtypes that can be read
Read = Callable[[str], NDArray[np.float32]]


@contextmanager
def bits(header: Header) -> Iterator[Callable[[str], NDArray[np.unsignedinteger]]]:
    """A function from a key to the tensor's bits as integers. safetensors has checked the header before."""
    with header.path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        table = json.loads(file.read(size))
    data = np.memmap(header.path, np.uint8, "r")

    def read(key: str) -> NDArray[np.unsignedinteger]:
        start, count = 8 + size + table[key]["data_offsets"][0], prod(header.shapes[key])
        dtype = header.dtypes[key]
        kind = _BITS[dtype][0] if dtype in _BITS else f"<u{np.dtype(_NUMBERS[dtype]).itemsize}"
        return np.frombuffer(data, kind, count, start) if count else np.zeros(0, kind)

    yield read


@contextmanager
def numbers(header: Header) -> Iterator[Read]:
    """A function from a key to the tensor as an fp32 array. fp64 and integers are rounded to fp32, which is enough for reports."""
    with bits(header) as stored:

        def read(key: str) -> NDArray[np.float32]:
            raw, dtype = stored(key), header.dtypes[key]
            if dtype == "BF16":
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            elif dtype == "F8_E4M3":
                raw = _E4M3[raw]
            else:
                if dtype == "F8_E5M2":  # its bits are the upper half of fp16's
                    raw, dtype = raw.astype(np.uint16) << 8, "F16"
                with np.errstate(over="ignore", invalid="ignore"):  # invalid: a signalling NaN
                    raw = raw.view(_NUMBERS[dtype]).astype(np.float32, copy=False)
            return raw.reshape(header.shapes[key])

        yield read


def _e4m3() -> NDArray[np.float32]:
    """All 256 values: a sign, four bits of exponent with bias 7, three of mantissa. The last code of each sign is NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    sizes = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(codes & 127 == 127, np.nan, np.where(codes >> 7, -sizes, sizes)).astype(np.float32)


_E4M3 = _e4m3()


def broken(header: Header) -> tuple[str, ...]:
    """The keys of tensors that contain NaN or infinity."""
    out = []
    with bits(header) as stored:
        for key, dtype in header.dtypes.items():
            if dtype in _BITS:
                raw = stored(key)
                exponent = np.array(_BITS[dtype][1], raw.dtype)
                if bool(((raw & exponent) == exponent).any()):
                    out.append(key)
    return tuple(out)


def alphas(header: Header) -> dict[str, float]:
    """Key → value of every `.alpha` that is a single number of any type."""
    with numbers(header) as read:
        keys = [key for key in header.shapes if (cut := split_key(key)) and cut.part == "alpha"]
        return {
            key: float(read(key).flat[0])
            for key in keys
            if header.dtypes[key] in READABLE and prod(header.shapes[key]) == 1
        }


def silent(header: Header, keys: Iterable[str]) -> bool:
    """Whether all these tensors are 0."""
    with bits(header) as stored:
        return all(
            header.dtypes[key] in _BITS and not bool((stored(key) << 1).any()) for key in keys
        )  # the shift removes the sign, so that −0 counts as 0
