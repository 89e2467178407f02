"""A worker of a grid: trains jobs from their folders, beside any number of other workers that share the folders.

A worker takes the jobs in order and skips those that are done or that another worker has. At its end it waits for the others'
jobs, and takes up those whose worker has died. So it does not matter how many workers there are, or how often one is killed.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from unbraid.bases.base import Base
from unbraid.bases.presets import AS_IT_IS
from unbraid.bases.savings import memory_error
from unbraid.common.errors import UsageError, printable
from unbraid.core.recipe import TrainingCoroutine
from unbraid.core.train import run_one
from unbraid.runs import job_folder, pace
from unbraid.runs.batch import FAULTS, finder, recorded, run_together
from unbraid.runs.cluster import DONE, FAILED, HELD
from unbraid.runs.folder import JOB, locked
from unbraid.runs.job import Job, Progress
from unbraid.runs.lease import AtWorkError
from unbraid.runs.run import script


@dataclass(frozen=True)
class Event:
    """What happened to a job of a grid: it ended, as done or with an error, or it is on its way.

    `held`: another worker has it. It comes again later."""

    folder: Path
    done: bool = False
    held: bool = False
    error: UsageError | None = None
    progress: Progress | None = None


def share(text: str) -> tuple[int, int]:
    """`i/n` as two numbers, 0 <= i < n; the empty text is 0/1. UsageError for others."""
    parts = (text or "0/1").split("/")
    if len(parts) == 2 and all(part.isdecimal() and len(part) < 9 for part in parts):
        i, n = map(int, parts)
        if i < n:
            return i, n
    raise UsageError(f"{text!r} is no share of the jobs", "--shard", "The first of three is 0/3, the last 2/3.")


def run_here(
    folders: Sequence[Path],
    at_once: int | None = 1,
    device: str | None = None,
    find: Callable[[Job], Base] | None = None,
) -> Generator[Event]:
    """Train the jobs of these folders in this process until all are done or have failed. Yields what happens to them.

    `at_once`: how many train in common passes, as in `batch`; None: as many as there is memory for. `find`: gives the base of a job;
    by default, the last base is kept in memory."""
    find, todo = find or finder(device, most=1), list(folders)
    while todo:
        held = list[Path]()
        for event in run_once(todo, at_once, find):
            held += [event.folder] if event.held else []
            yield event
        todo = held
        time.sleep(pace.LOOK_AGAIN if todo else 0)


def run_once(folders: Sequence[Path], at_once: int | None, find: Callable[[Job], Base]) -> Generator[Event]:
    """One round over the folders. Jobs that other workers have are yielded as `held`, and left to them."""
    if at_once is not None and at_once < 1:
        raise UsageError(f"{at_once} runs at once", "--at-once", "Give 1 or more.")
    together = run_together((_script(folder, find) for folder in folders), at_once)
    for which, event in _in_turn(folders, find) if at_once == 1 else together:
        folder = folders[which]
        if isinstance(event, AtWorkError):
            yield Event(folder, held=True)
        elif isinstance(event, UsageError):
            job_folder.mark_failed(folder, event)
            yield Event(folder, error=event)
        else:
            yield Event(folder, done=event is END, progress=None if event is END else event)


def _in_turn(folders: Sequence[Path], find: Callable[[Job], Base]) -> Generator[tuple[int, Progress | UsageError]]:
    """One job after another, each as `run` does it: with the passes of its memory preset, and CUDA graphs where there are any."""
    for which, folder in enumerate(folders):
        try:
            for event in _alone(folder, find):
                yield which, event
        except UsageError as error:
            yield which, error


def _alone(folder: Path, find: Callable[[Job], Base]) -> Generator[Progress]:
    preset = AS_IT_IS.preset if job_folder.is_done(folder) else recorded(folder / JOB).loading.preset
    try:
        with closing(_script(folder, find)) as training:  # else an error would keep the folder locked
            yield from run_one(training, preset.at_once)
    except torch.OutOfMemoryError as error:
        raise memory_error(preset, False) from error


def answers(
    folders: Sequence[str], at_once: int | None, device: str | None
) -> Generator[tuple[int, str, UsageError | str]]:
    """One round in a worker process of a cluster: what became of each job, as `cluster.Work`."""
    paths = list(map(Path, folders))
    for event in run_once(paths, at_once, _finder(device)):
        if event.error or event.held or event.done:
            how = FAILED if event.error else HELD if event.held else DONE
            yield paths.index(event.folder), how, event.error or ""


@cache
def _finder(device: str | None) -> Callable[[Job], Base]:
    """One for each worker process, so that the base of its last job is still there for the next one."""
    return finder(device, most=1)


END = Progress(1, 1)  # the last event of a job that is done


def _script(folder: Path, find: Callable[[Job], Base]) -> TrainingCoroutine[Progress]:
    try:
        if not job_folder.is_done(folder):
            with locked(folder, shared=True):  # AtWorkError before a base is loaded for nothing
                pass
            yield from script(recorded(folder / JOB), False, find)
        yield END
    except FAULTS as error:
        what = f"{type(error).__name__}: {printable(' '.join(str(error).split()), 200)}"
        raise UsageError(what, folder, "The others go on. The same command tries it again.") from error
