"""The queue of trainings: the job folders in the studio's folder `runs`, as those of a grid (docs/grid.md).

All that is known of a run is in its folder, so studios may end, start again, and be several, and other workers may take part. The
studio itself adds one file, process.json: the process that it started for the run, on which device, and when it was asked to stop."""

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from unbraid.common.errors import UsageError
from unbraid.methods import METHODS
from unbraid.runs import folder as run_folder
from unbraid.runs import job_folder
from unbraid.runs.job import Job
from unbraid.runs.job_folder import write_job
from unbraid.studio import process
from unbraid.studio.process import write_json
from unbraid.studio.safety import Home

State = Literal["waiting", "starting", "running", "stopping", "stopped", "done", "failed"]
ASKED = "stop"  # in process.json: when the run was asked to stop
PATIENCE = 60.0  # seconds until a process that was asked to end is terminated: a step and a preview may take long
CUT_OFF = (
    "It ended without a word: the machine was switched off, or memory ran out. Go on continues from its last save."
)


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it. `done` of `total` steps (0: not known yet). `message`: why it failed, or ""."""

    name: str
    folder: Path
    state: State
    done: int = 0
    total: int = 0
    loss: float | None = None
    message: str = ""
    device: str = ""

    @property
    def alive(self) -> bool:
        return self.state in ("starting", "running", "stopping")


def add(folder: Path, job: Job) -> None:
    """Put a job into the queue, to be trained into this folder."""
    write_job(replace(job, out=folder))


def runs(home: Home) -> list[Run]:
    """All runs of the studio's folder, the newest first."""
    known = [path for path in home.runs.glob(f"*/{run_folder.JOB}") if home.contains(path)]
    return [look(path.parent) for path in sorted(known, key=_since, reverse=True)]


def _since(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def look(folder: Path) -> Run:
    """A run's state, from its folder alone."""
    total = _steps(record(folder))
    last = _last_event(folder)
    done, loss = (last["step"] + 1, last["loss"]) if last else (0, None)
    device = str(process.record(folder).get("device", ""))
    state, message = _state(folder)
    return Run(folder.name, folder, state, total if state == "done" else done, total, loss, message, device)


def _state(folder: Path) -> tuple[State, str]:
    mine, known = process.record(folder), job_folder.state(folder)
    if process.found(folder) or known == "at work":
        return "stopping" if ASKED in mine else "running" if run_folder.begun(folder) else "starting", ""
    if known == "done":
        return "done", ""
    if ASKED in mine:
        return "stopped", ""
    if known == "failed":
        return "failed", job_folder.read_failed(folder)
    if not (folder / process.RECORD).exists():
        return "waiting", ""
    lines = process.tail(folder).strip().splitlines()  # it ended before it could write down why
    return ("failed", lines[-1]) if lines and "Error" in lines[-1] else ("stopped", CUT_OFF)


def record(folder: Path) -> dict[str, Any]:
    """The job.toml of a run; empty if it is damaged."""
    with suppress(UsageError):
        found = job_folder.read_job(folder)
        if found.get("method") in METHODS and isinstance(found.get(found["method"]), dict):
            return found
    return {}


def _steps(recorded: dict[str, Any]) -> int:
    steps = recorded.get(recorded.get("method", ""), {}).get("steps", 0)
    return steps if isinstance(steps, int) else 0


def _last_event(folder: Path) -> dict[str, Any] | None:
    """The last event of a run. Only the end of the file is read: the list of runs asks for it every two seconds."""
    for line in reversed(process.tail(folder, 8000, run_folder.EVENTS).splitlines()):
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("step"), int) and isinstance(event.get("loss"), float):
                return event
    return None


def stop(folder: Path) -> None:
    """Ask a run to save, to write its LoRAs and to end after its step; or take it out of the queue.

    One that has not begun to train is interrupted, as by Ctrl-C."""
    run = look(folder)
    if run.state not in ("waiting", "starting", "running"):
        raise UsageError(f"it is {run.state}", run.name, "There is nothing to stop.")
    write_json(folder / process.RECORD, process.record(folder) | {ASKED: time.time()})
    if run.state == "starting" and process.found(folder):
        process.interrupt(folder)
    elif run.alive:
        (folder / run_folder.STOP).touch()


def go_on(folder: Path) -> None:
    """Put a run that was stopped, or that failed, back into the queue. It goes on from its last save."""
    run = look(folder)
    if run.state not in ("stopped", "failed"):
        raise UsageError(f"it is {run.state}", run.name, "There is nothing to go on with.")
    for name in (process.RECORD, run_folder.STOP, job_folder.FAILED):
        (folder / name).unlink(missing_ok=True)
    (folder / run_folder.JOB).touch()  # it waits behind the others


def remove(home: Home, folder: Path) -> Path:
    """Move a run that is not at work out of the list, into the folder `removed`. Returns where it is now."""
    run = look(folder)
    if run.alive:
        raise UsageError("it is at work", run.name, "Stop it first.")
    target = home.folder / "removed" / f"{folder.name}-{time.time_ns():x}"
    target.parent.mkdir(exist_ok=True)
    return folder.rename(target)


def advance(home: Home, devices: Sequence[str]) -> list[str]:
    """Start waiting runs, the oldest first, on devices without a run. Returns the names of those that were started.

    Also terminates processes that do not react to being interrupted."""
    try:
        with FileLock(home.folder / ".queue.lock").acquire(timeout=0):
            found = runs(home)
            for run in found:
                if run.state == "stopping" and time.time() - process.record(run.folder).get(ASKED, 0.0) > PATIENCE:
                    process.terminate(run.folder)
            busy = [run.device for run in found if run.alive and process.found(run.folder)]
            free = [device for device in devices if device not in busy]
            waiting = [run for run in reversed(found) if run.state == "waiting"]
            return [_begin(run, device) for device, run in zip(free, waiting, strict=False)]
    except Timeout:  # another studio is doing it
        return []


def _begin(run: Run, device: str) -> str:
    process.start(["grid", str(run.folder)], run.folder, device)
    return run.name


def cards() -> list[str]:
    """The devices to train on: each CUDA card if there are several; else one, of which the name is left open."""
    count = torch.cuda.device_count()
    return [f"cuda:{i}" for i in range(count)] if count > 1 else [""]


def keep_advancing(home: Home, devices: Sequence[str], every: float = 1.0) -> threading.Event:
    """Call `advance` again and again in a thread, until the returned event is set."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(every):
            with suppress(OSError, UsageError):  # a full disk, a folder that was moved: tried again
                advance(home, devices)

    threading.Thread(target=loop, daemon=True, name="queue").start()
    return ended
