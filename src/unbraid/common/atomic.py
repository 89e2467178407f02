"""Writing files atomically; reading TOML files; hashing files."""

import hashlib
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unbraid.common.contents import TEXT, mismatch
from unbraid.common.errors import UsageError, printable

_numbers = count()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to. It is renamed to `path` at the end, or removed after an error.

    Raises UsageError if the folder cannot be written or the disk is full."""
    part = path.with_name(
        f".{os.getpid():x}-{next(_numbers)}.part{path.suffix}"
    )  # unique, because two processes may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot be written ({reason})", path, "Choose another folder or make room.") from error
    finally:
        with suppress(OSError):  # if the folder cannot be written, the error above is already raised
            part.unlink(missing_ok=True)


def read_toml(path: Path, fix: str) -> dict[str, Any]:
    """The contents of a TOML file. UsageError if it cannot be read or parsed; `fix` completes the message."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # syntax errors, too deep nesting, numbers with too many digits
        raise UsageError(_no_toml(path, error), path, fix) from error


def _no_toml(path: Path, error: Exception) -> str:
    """Why a path could not be read as TOML: it is not there, of another kind, may not be read, or has an error in it."""
    if other := mismatch(path, "a TOML file", (TEXT,)):
        return other
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    if isinstance(error, UnicodeError):
        return "not a TOML file: it is not text in UTF-8"
    return f"not a TOML file: {printable(' '.join(str(error).split()), 150)}"


def sha256(path: Path, start: int = 0) -> str:
    """The SHA-256 of a file, or of its bytes from `start` on, in hexadecimal. UsageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror})", path, "Check the path.") from error
