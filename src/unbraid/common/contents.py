"""What a path is, in a few words: for the error when a file of another kind is wanted."""

import os
from collections.abc import Container
from pathlib import Path

FOLDER, PICTURE, TEXT, SAFETENSORS = "a folder", "a picture", "a text", "a safetensors file"
_PICTURES = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"8BPS",
    b"\xff\x0a",
    b"\0\0\0\x0cJXL ",
)


def contents(path: Path) -> str:
    """What a path is: `a folder`, `a picture`, `a text`, `a safetensors file`; empty if it is not there or something else."""
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for names that are too long)
        return FOLDER
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ""
    if start.startswith(_PICTURES) or start[4:8] == b"ftyp" or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        return PICTURE
    if start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") < 2**32:
        return SAFETENSORS  # it begins with the length of its header, which is JSON
    text = start.decode("utf-8-sig", "ignore")  # the last letter may be cut
    readable = len(text.encode()) > len(start) - 8 and all(one.isprintable() or one.isspace() for one in text)
    return TEXT if text and readable else ""


def mismatch(path: Path, wanted: str, fitting: Container[str]) -> str:
    """What is wrong with a path by its kind, such as `is a picture, not a TOML file`, where a `fitting` one is `wanted`; empty if
    nothing is, or if the kind is not known."""
    known = contents(path)
    if known and known not in fitting:
        return f"is {known}, not {wanted}"
    there = os.path.exists(path)  # noqa: PTH110 (as above)
    return "" if there else f"there is no such {'folder' if FOLDER in fitting else 'file'}"
