"""Files that are there whole or not at all, and small things read from files."""

import hashlib
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unbraid.common.errors import UsageError

_numbers = count()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, unique to this process, to write to; renamed at the end, removed on any failure.

    Raises UsageError if the folder cannot be written or the disk is full."""
    part = path.with_name(f".{os.getpid():x}-{next(_numbers)}.part{path.suffix}")  # two processes may write one file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot be written ({reason})", path, "Choose another folder or make room.") from error
    finally:
        with suppress(OSError):  # where the folder itself cannot be written: that has been said
            part.unlink(missing_ok=True)


def read_toml(path: Path, fix: str) -> dict[str, Any]:
    """A TOML file. UsageError for what is none."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # tomllib's own, too much depth, numbers of too many digits
        reason = " ".join(str(error).split())[:150]
        raise UsageError(f"not a TOML file: {reason}", path, fix) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
