"""Several runs in one process. Each has its own folder, as if run alone; passes through a common base are batched."""

import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from unbraid.bases.base import Base, joined, load
from unbraid.bases.presets import AS_IT_IS, Loading
from unbraid.common.atomic import read_toml
from unbraid.common.errors import UsageError, printable
from unbraid.core.many import run_batched
from unbraid.core.recipe import TrainingCoroutine
from unbraid.runs import folder
from unbraid.runs.drawing import forget_base
from unbraid.runs.job import Extras, Job, Progress, TrainingData, TrainingOptions, checked_training
from unbraid.runs.job_folder import mark_failed, write_job
from unbraid.runs.run import script
from unbraid.runs.settings import PREVIEWS, SEEDS, counted, resolve

FAULTS = (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError, MemoryError)


def batch(
    jobs: Sequence[Job], *, at_once: int | None = None, resume: bool = False, device: str | None = None
) -> list[Path]:
    """Train independent jobs into their folders, and return the folders.

    `at_once`: how many runs train at a time; by default as many as there is memory for, up to 8. If a run fails, the
    others still go on. At the end UsageError gives the number of failed runs and the first error."""
    forget_base()
    failed = list[UsageError]()
    for which, event in run_many(jobs, at_once, resume, device):
        if isinstance(event, UsageError):
            failed.append(event)
        elif event.undone:
            warnings.warn(f"{jobs[which].out}: {event.warning}", RuntimeWarning, stacklevel=2)
    if failed:
        raise UsageError(f"{len(failed)} of {len(jobs)} runs failed", "batch", f"The first: {failed[0]}")
    return [job.out for job in jobs]


def run_many(
    jobs: Sequence[Job], at_once: int | None = None, resume: bool = False, device: str | None = None
) -> Generator[tuple[int, Progress | UsageError]]:
    """Train several jobs as `run` does. Yields the index of a job with its progress, or with its error if it failed.

    With `resume`, finished runs are left as they are, and runs that have not begun start from the beginning."""
    check_folders(jobs, resume)
    if at_once is not None and at_once < 1:
        raise UsageError(f"{at_once} runs at once", "--at-once", "Give 1 or more.")
    write_jobs(jobs)
    return _trained(jobs, at_once, resume, finder(device))


def write_jobs(jobs: Sequence[Job]) -> None:
    """Write job.toml into the folders of runs that have not begun. A job that is wrong says so when it is its turn."""
    for job in jobs:
        if not folder.begun(job.out):
            with suppress(UsageError, OSError):
                write_job(job)


def _trained(
    jobs: Sequence[Job], at_once: int | None, resume: bool, find: Callable[[Job], Base]
) -> Generator[tuple[int, Progress | UsageError]]:
    for which, event in run_together([_script(job, resume, find) for job in jobs], at_once):
        if isinstance(event, UsageError):
            mark_failed(jobs[which].out, event)
        yield which, event


def finder(device: str | None, most: int | None = None) -> Callable[[Job], Base]:
    """A function that gives the base of a job. It keeps the `most` last bases in memory; by default all."""

    @lru_cache(most)
    def opened(name: str, loading: Loading) -> Base:
        return load(name, device, loading)

    def find(job: Job) -> Base:
        """A copy of the shared base, so that one run can release its text encoders while others still need theirs."""
        base = copy.copy(opened(job.base, job.loading))
        base.pipe = copy.copy(base.pipe)
        return base

    return find


def check_folders(jobs: Sequence[Job], resume: bool) -> None:
    """Raise UsageError if two jobs have the same folder, or, without `resume`, if a folder holds a run already."""
    seen: dict[Path, int] = {}
    for i, job in enumerate(jobs):
        if (other := seen.setdefault(job.out.resolve(), i)) != i:
            raise UsageError(f"run {other + 1} and run {i + 1} have one folder", job.out, "Give each its own `out`.")
    begun = [job.out for job in jobs if folder.begun(job.out)]
    if begun and not resume:
        fix = "Add --resume: it trains what is not finished. Or give other folders."
        raise UsageError(f"{len(begun)} of {len(jobs)} runs have been begun already", begun[0], fix)


def run_together(
    scripts: Iterable[TrainingCoroutine[Progress]], at_once: int | None
) -> Generator[tuple[int, Progress | UsageError]]:
    """`run_batched` for runs. UsageError if memory runs out."""
    try:
        yield from run_batched(scripts, joined, at_once)
    except torch.OutOfMemoryError as error:
        fix = "Give a lower --at-once, and --resume."
        raise UsageError("there is not enough memory for so many runs at once", "batch", fix) from error


def _script(job: Job, resume: bool, find: Callable[[Job], Base]) -> TrainingCoroutine[Progress]:
    try:
        yield from script(job, resume and folder.begun(job.out), find)
    except FAULTS as error:
        what = f"{type(error).__name__}: {printable(' '.join(str(error).split()), 200)}"
        raise UsageError(
            what, job.out, "The other runs go on. By itself it says more: `unbraid batch`, with its run.toml."
        ) from error


class _Record(BaseModel):
    """The keys and types of a run.toml, and the defaults of those that may be missing."""

    model_config = ConfigDict(strict=True, extra="allow")
    method: str
    base: str
    seed: int
    previews: int
    words: dict[str, str]
    images: dict[str, list[str]]
    loras: dict[str, str] = {}
    captions: dict[str, str] = {}
    blocks: dict[str, list[str]] = {}
    vae: str = ""
    parts: str = ""
    prediction: str = ""
    vram: str = "max"
    swap: int = 0
    compile: bool = False
    graphs: bool = True
    device: str = ""
    timesteps: str = ""
    thumbnail: bool = True
    metadata: bool = True
    resolution: int = 0
    schedule: str = "constant"
    warm_up: int = 0
    batch_size: int = 1
    alpha: float = 0.0
    optimizer: str = ""
    templates: dict[str, str] = {}


def recorded(file: Path) -> Job:
    """The job that a run.toml records; it trains into the folder of that file. UsageError if `file` is no run.toml."""
    fix = "Give the run.toml of a run's folder."
    try:
        table = _Record(**read_toml(file, fix))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"this is no whole run.toml ({'.'.join(map(str, first['loc']))[:80]}: {first['msg']})"
        raise UsageError(what, file, fix) from error
    data = TrainingData(
        {role: tuple(map(Path, paths)) for role, paths in table.images.items()},
        table.words,
        {Path(path): text for path, text in table.captions.items()},
        {role: Path(path) for role, path in table.loras.items()},
        replace(
            checked_training(**{name: getattr(table, name) for name in TrainingOptions.__annotations__}),
            blocks={role: tuple(some) for role, some in table.blocks.items()},
        ),
    )
    return Job(
        table.method,
        data,
        resolve(table.method, table.base, file, {}),
        file.parent,
        table.base,
        Loading(**{name: getattr(table, name) for name in AS_IT_IS.__dataclass_fields__}),
        counted("seed", table.seed, SEEDS),
        Extras(counted("previews", table.previews, PREVIEWS), table.thumbnail, table.metadata),
    )
