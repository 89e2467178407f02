"""The run folder: its record, its events, its saved state, and the lock on it."""

import hashlib
import json
import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from unbraid.common.atomic import atomic, read_toml
from unbraid.common.errors import UsageError
from unbraid.common.interrupts import interrupts_kept
from unbraid.runs.absolute import absolute
from unbraid.runs.lease import AtWorkError, Clock, leased

HOW = "unbraid vram swap compile graphs device thumbnail metadata".split()  # may differ when a run is resumed
RECORD, EVENTS, STATE, LOCK = "run.toml", "events.jsonl", "state.safetensors", ".lock"
JOB = "job.toml"  # a run that was written down before it began: see job_folder
STOP = "stop"  # an empty file that asks a run to save after its step, write its LoRAs and end
DIGEST = "sha256"  # the metadata key of the saved state that holds its checksum


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """Write run.toml: all resolved values, readable by people and by `--config`."""
    with atomic(out / RECORD) as part:
        part.write_text(to_toml(record), "utf-8")


def to_toml(record: Mapping[str, Any]) -> str:
    """A record as TOML. UsageError for strings that are not valid Unicode.

    Those hold half of a surrogate pair; Python makes them of file names in another encoding."""
    try:
        text = tomli_w.dumps(record)
        text.encode()
    except UnicodeEncodeError as error:
        what = f"a word or a name that is no Unicode text: {error.object[:200]!r}"
        raise UsageError(what, RECORD, "Rename it, or write it anew.") from error
    return text


@contextmanager
def locked(out: Path, clock: Clock = time.time, *, shared: bool = False) -> Iterator[Callable[[], None]]:
    """Lock a folder for one worker. AtWorkError, a UsageError, if another one holds the lock.

    A job folder is also leased, which keeps other machines out, where there are hard links. `shared`: any folder is, and must be.
    Gives a function that raises AtWorkError if the lease was lost. Also deletes the partly written files of workers that were killed."""
    lock = FileLock(out / LOCK, thread_local=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        fix = "Wait until it is done, or choose another --out."
        raise AtWorkError("another run is at work in this folder", out, fix) from error
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror})", out, "Choose another folder or make room.") from error
    try:
        with leased(out, clock, shared) if shared or is_job(out) else nullcontext() as lease:
            for part in out.glob(".*.part*"):
                with suppress(OSError):
                    part.unlink()
            yield lease.check if lease else lambda: None
    finally:
        with suppress(OSError):
            (out / LOCK).unlink()  # safe: filelock notices if another process has opened the file already
        lock.release()


def claim(out: Path, record: Mapping[str, Any], resume: bool) -> None:
    """Make `out` this run's folder by writing run.toml there. UsageError if `claimable` refuses it."""
    claimable(out, record, resume)
    write_record(out, record)


def claimable(out: Path, record: Mapping[str, Any], resume: bool) -> None:
    """Check, without writing, that a run may use a folder.

    UsageError without `resume` if the folder holds a run; with it, if it holds none, or one with other settings."""
    there = out / RECORD
    try:
        begun, in_the_way = there.exists(), out.exists() and not out.is_dir()
    except OSError as error:
        raise UsageError(f"cannot be used ({error.strerror})", out, "Choose another --out.") from error
    if in_the_way:
        raise UsageError("is a file, not a folder", out, "Choose another --out.")
    if resume and not begun:
        raise UsageError("there is no run to resume here", out, "Start it without --resume.")
    wanted = tomllib.loads(to_toml(record))
    if is_job(out) and (other := difference(read_toml(out / JOB, "Delete the folder."), absolute(wanted))):
        raise UsageError(f"the run is no longer what {JOB} says: {other}", out, "Start it anew in another folder.")
    if resume and (other := difference(read_toml(there, "Start anew in another folder."), wanted)):
        fix = f"Use the settings of {there}, or start anew in another folder."
        raise UsageError(f"the run in this folder has other settings: {other}", out, fix)
    if begun and not resume:
        raise UsageError(
            "this folder holds a run already", out, "Add --resume to go on with it, or choose another --out."
        )


def begun(out: Path) -> bool:
    """Whether a folder holds a run. False also for a path that the system cannot look at, such as a name that is too long."""
    return os.path.exists(out / RECORD)  # noqa: PTH110 (pathlib raises for names that are too long)


def is_job(out: Path) -> bool:
    """Whether a folder holds a job.toml."""
    return os.path.exists(out / JOB)  # noqa: PTH110 (pathlib raises for names that are too long)


def goes_on(out: Path, resume: bool) -> bool:
    """Whether a run continues what its folder holds: as asked for, but in a job folder whenever it has been begun."""
    return begun(out) if is_job(out) else resume


def free(out: Path) -> Path:
    """The first of OUT, OUT-2, OUT-3, … that holds no run."""
    return next(one for one in numbered(out) if not begun(one))


def last(out: Path) -> Path:
    """The last of OUT, OUT-2, OUT-3, … before the first that holds no run; OUT if there is no run at all."""
    return [out, *takewhile(begun, numbered(out))][-1]


def numbered(out: Path) -> Iterator[Path]:
    """OUT, OUT-2, OUT-3, …"""
    yield out
    yield from (out.with_name(f"{out.name}-{i}") for i in count(2))


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first difference of two records, as text: `style: 'ink' there, 'oil' here`. Empty if there is none."""
    for key in dict.fromkeys((*there, *here)):
        one, other = there.get(key), here.get(key)
        if one == other or key in HOW:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            return difference(one, other)
        return f"{key[:60]}: {_short(one)} there, {_short(other)} here"
    return ""


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) < 60 else f"{text[:50]} …"


def save_state(out: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic(out / STATE) as part:
        save_file(dict(tensors), part, {DIGEST: _digest(tensors)})


def load_state(out: Path) -> dict[str, Tensor] | None:
    """The last saved state; None if the run was killed before the first save. UsageError if the file is damaged."""
    path = out / STATE
    if not path.exists():
        return None
    fix = "Delete it to start this run from its beginning."
    try:
        with interrupts_kept(), safe_open(path, "pt") as file:
            found, digest = {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {}).get(DIGEST)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"is damaged ({error})", path, fix) from error
    if digest is None:
        raise UsageError("was not saved by this unbraid: it has no checksum", path, fix)
    if digest != _digest(found):
        raise UsageError("is damaged: its checksum is another one", path, fix)
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.reshape(-1).view(uint8).numpy().data)
    return found.hexdigest()


class Events:
    """events.jsonl: one line per training step: its number (from 0), the loss and its parts by name, the norm of the gradient,
    the time (seconds since 1970), the rate (steps per second) and the memory in use (bytes). Lines from `step` on are dropped: a resumed run repeats them."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / EVENTS
        kept = [event for event in read_events(out) if event["step"] < step]
        with atomic(self.path) as part:
            part.write_text("".join(json.dumps(event) + "\n" for event in kept), "utf-8")
        self.waiting: list[dict[str, Any]] = []

    def add(self, **event: Any) -> None:
        """Keep an event until `flush`. Values may be tensors: only `flush` waits for the accelerator to read them."""
        self.waiting.append(event)

    def flush(self) -> None:
        """Append the events since the last flush: all lines or none. UsageError if that fails, as on a full disk."""
        data = "".join(json.dumps(one, default=Tensor.tolist) + "\n" for one in self.waiting).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    written = 0
                    while written < len(data):
                        written += file.write(data[written:]) or 0
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise UsageError(f"cannot be written ({error.strerror})", self.path, "Make room, then --resume.") from error
        self.waiting.clear()


def read_events(out: Path) -> list[dict[str, Any]]:
    """The events of training steps in events.jsonl. Damaged lines are skipped."""
    path = out / EVENTS
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("step"), int) and isinstance(event.get("loss"), float):
                found.append(event)
    return found
