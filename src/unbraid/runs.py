"""Several runs in one process: each in its own folder, as if alone, and their passes through a common base together."""

import copy
import tomllib
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from unbraid import folder
from unbraid.base import Base, joined, load
from unbraid.errors import UsageError
from unbraid.job import Job, Progress, prompts_of, record
from unbraid.many import together
from unbraid.methods import METHODS
from unbraid.presets import AS_IT_IS, Loading
from unbraid.recipe import Script
from unbraid.run import script
from unbraid.settings import resolve


def batch(
    jobs: Sequence[Job], *, at_once: int | None = None, resume: bool = False, device: str | None = None
) -> list[Path]:
    """Train independent jobs into their folders; returns these. `at_once`: how many at a time, by default as many as there is
    memory for, up to 8. A run that fails leaves the others alone; at the end UsageError says which did."""
    failed = [event for _, event in run_many(jobs, at_once, resume, device) if isinstance(event, UsageError)]
    if failed:
        raise UsageError(f"{len(failed)} of {len(jobs)} runs failed", "batch", f"The first: {failed[0]}")
    return [job.out for job in jobs]


def run_many(
    jobs: Sequence[Job], at_once: int | None = None, resume: bool = False, device: str | None = None
) -> Generator[tuple[int, Progress | UsageError]]:
    """`run` of several jobs: (which, what happens), and the error of one that fails. With `resume` those that are done are left
    alone, and those that were not begun begin."""
    seen: dict[Path, int] = {}
    for i, job in enumerate(jobs):
        if (other := seen.setdefault(job.out.resolve(), i)) != i:
            raise UsageError(f"run {other + 1} and run {i + 1} have one folder", job.out, "Give each its own `out`.")
    if at_once is not None and at_once < 1:
        raise UsageError(f"{at_once} runs at once", "--at-once", "Give 1 or more.")

    @cache
    def opened(name: str, loading: Loading) -> Base:
        return load(name, device, loading)

    def find(job: Job) -> Base:
        """The common base, of which a run can release its text encoders while others still need them."""
        base = copy.copy(opened(job.base, job.loading))
        base.pipe = copy.copy(base.pipe)
        return base

    return _told([_script(job, resume, find) for job in jobs], at_once)


def _told(scripts: Sequence[Script[Progress]], at_once: int | None) -> Generator[tuple[int, Progress | UsageError]]:
    try:
        yield from together(scripts, joined, at_once)
    except torch.OutOfMemoryError as error:
        fix = "Give a lower --at-once, and --resume."
        raise UsageError("there is not enough memory for so many runs at once", "batch", fix) from error


def _script(job: Job, resume: bool, find: Callable[[Job], Base]) -> Script[Progress]:
    begun = resume and (job.out / folder.RECORD).exists()
    if begun and finished(job):
        folder.claim(job.out, record(job, prompts_of(job)), resume=True)
        yield Progress(1, 1, warning="done already")
        return
    yield from script(job, begun, find)


def finished(job: Job) -> bool:
    """Whether a run's folder has all its LoRAs, and nothing to go on from."""
    stems = METHODS[job.method].outputs(job.settings)
    there = all((job.out / f"{stem}.safetensors").exists() for stem in stems)
    return there and not (job.out / folder.STATE).exists()


def recorded(file: Path) -> Job:
    """The job of a run.toml, in that file's folder. UsageError if it is no such file."""
    try:
        table = tomllib.loads(file.read_text())
        method, images, loras = table["method"], table["images"], table.get("loras", {})
        settings = resolve(method, table["base"], file, {})
        return Job(
            method,
            {role: tuple(map(Path, paths)) for role, paths in images.items()},
            table["words"],
            file.parent,
            settings,
            table["base"],
            table["seed"],
            table["previews"],
            {role: Path(path) for role, path in loras.items()},
            {Path(path): text for path, text in table.get("captions", {}).items()},
            Loading(**{name: table[name] for name in asdict(AS_IT_IS) if name in table}),
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise UsageError(
            f"this is no whole run.toml ({error})", file, "Give the run.toml of a run's folder."
        ) from error
