"""The run folder: what is written there, and that nothing is ever half-written."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbraid.errors import UsageError

KEY = re.compile(r"[A-Za-z0-9_-]+")
HOW = re.compile(
    r"^(vram|compile|graphs|device) = .*\n", re.MULTILINE
)  # how memory and time are saved may change when a run goes on
RECORD, EVENTS, STATE = "run.toml", "events.jsonl", "state.safetensors"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed at the end, removed on any failure.

    Raises UsageError if the folder cannot be written or the disk is full."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
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


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """run.toml: everything resolved, readable by people and by `--config`."""
    with atomic(out / RECORD) as part:
        part.write_text(to_toml(record))


def to_toml(record: Mapping[str, Any]) -> str:
    """Scalars first, then one table per mapping. JSON strings are TOML strings, as keys too."""
    scalars = [
        f"{key if KEY.fullmatch(key) else json.dumps(key)} = {json.dumps(value)}"
        for key, value in record.items()
        if not isinstance(value, Mapping)
    ]
    tables = [f"\n[{key}]\n{to_toml(value)}" for key, value in record.items() if isinstance(value, Mapping)]
    return "\n".join([*scalars, *tables]) + ("\n" if scalars else "")


def claim(out: Path, record: Mapping[str, Any], resume: bool) -> None:
    """Make `out` this run's folder. A folder of another run is refused, unless it is being resumed."""
    claimable(out, record, resume)
    write_record(out, record)


def claimable(out: Path, record: Mapping[str, Any], resume: bool) -> None:
    """UsageError if `claim` would refuse the folder."""
    there = out / RECORD
    if out.exists() and not out.is_dir():
        raise UsageError("is a file, not a folder", out, "Choose another --out.")
    if resume and not there.exists():
        raise UsageError("there is no run to resume here", out, "Start it without --resume.")
    if resume and HOW.sub("", there.read_text()) != HOW.sub("", to_toml(record)):
        fix = f"Use the settings of {there}, or start anew in another folder."
        raise UsageError("the run in this folder has other settings", out, fix)
    if there.exists() and not resume:
        raise UsageError(
            "this folder holds a run already", out, "Add --resume to go on with it, or choose another --out."
        )


def save_state(out: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic(out / STATE) as part:
        save_file(dict(tensors), part)


def load_state(out: Path) -> dict[str, Tensor] | None:
    """The last saved state; None if the run was killed before the first one."""
    path = out / STATE
    if not path.exists():
        return None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"is damaged ({error})", path, "Delete it to start this run from its beginning.") from error


class Events:
    """events.jsonl: one line per training step. Lines after the resumed step are dropped."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / EVENTS
        kept = [event for event in read_events(out) if event["step"] < step]
        with atomic(self.path) as part:
            part.write_text("".join(json.dumps(event) + "\n" for event in kept))
        self.waiting: list[dict[str, Any]] = []

    def add(self, **event: Any) -> None:
        """Values can be tensors: they are read when the file is written, so that an accelerator is not waited for."""
        self.waiting.append(event)

    def flush(self) -> None:
        """Append what was added since the last flush. Raises UsageError on a full disk."""
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(one, default=Tensor.tolist) + "\n" for one in self.waiting)
        except OSError as error:
            raise UsageError(f"cannot be written ({error.strerror})", self.path, "Make room, then --resume.") from error
        self.waiting.clear()


def read_events(out: Path) -> list[dict[str, Any]]:
    """All whole lines of events.jsonl."""
    path = out / EVENTS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
