"""A LoRA file's numbers without torch: numpy arrays straight from the file, bf16 included."""

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
from numpy.typing import NDArray

from unbraid.formats.header import Header
from unbraid.formats.names import split_key

# dtype → the type of its bits, the bits of its exponent (all set: infinite or NaN)
_BITS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF0 << 48)}
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
Read = Callable[[str], NDArray[np.float32]]


@contextmanager
def bits(header: Header) -> Iterator[Callable[[str], NDArray[np.unsignedinteger]]]:
    """A function key → the raw bits as integers. safetensors has checked the header already."""
    with header.path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        table = json.loads(file.read(size))
    data = np.memmap(header.path, np.uint8, "r")

    def read(key: str) -> NDArray[np.unsignedinteger]:
        start = 8 + size + table[key]["data_offsets"][0]
        kind = _BITS[header.dtypes[key]][0]
        return (
            np.frombuffer(data, kind, prod(header.shapes[key]), start)
            if prod(header.shapes[key])
            else np.zeros(0, kind)
        )

    yield read


@contextmanager
def numbers(header: Header) -> Iterator[Read]:
    """A function key → fp32 array (fp64 is cut down to it: reports need no more)."""
    with bits(header) as stored:

        def read(key: str) -> NDArray[np.float32]:
            raw, dtype = stored(key), header.dtypes[key]
            if dtype == "BF16":
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            else:
                raw = raw.view(_FLOATS[dtype]).astype(np.float32, copy=False)
            return raw.reshape(header.shapes[key])

        yield read


def broken(header: Header) -> tuple[str, ...]:
    """The keys of tensors with a NaN or an infinity in them."""
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
    """key → value of every `.alpha` that is one number."""
    with numbers(header) as read:
        keys = [key for key in header.shapes if (cut := split_key(key)) and cut.part == "alpha"]
        return {
            key: float(read(key).flat[0])
            for key in keys
            if header.dtypes[key] in _BITS and prod(header.shapes[key]) == 1
        }
