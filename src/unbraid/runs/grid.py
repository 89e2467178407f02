"""A grid: many runs as job folders, trained here, in shares, or on a Ray cluster."""

import warnings
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path

from unbraid.common.errors import UsageError
from unbraid.runs.batch import check_folders
from unbraid.runs.checks import check_all
from unbraid.runs.cluster import DONE, HELD, Cluster, spread
from unbraid.runs.drawing import forget_base
from unbraid.runs.folder import is_job
from unbraid.runs.grid_worker import Event, answers, run_here, share
from unbraid.runs.job import Job
from unbraid.runs.job_folder import is_done, write_job


def grid(
    jobs: Sequence[Job],
    *,
    shard: str = "",
    at_once: int | None = 1,
    device: str | None = None,
    ray: Cluster | None = None,
    progress: Callable[[Event], None] | None = None,
) -> list[Path]:
    """Train many jobs, each in its own job folder, and return the folders. The same call again goes on with what is not done.

    First all jobs are written down, then they are trained, by this process or on a Ray cluster. Other processes, on any machine
    that shares the folders, can work on them at the same time. `shard`: `i/n`, only every n-th job from the i-th on. `at_once`: how
    many train in common passes, as in `batch`. If a run fails, the others still go on; at the end UsageError gives the number of
    failed runs and the first error."""
    forget_base()
    check_folders(jobs, resume=True)
    i, n = share(shard)
    mine = jobs[i::n]
    check_all([job for job in mine if not is_job(job.out)])
    for job in mine:
        write_job(job)
    failed = dict[Path, UsageError]()
    for event in run([job.out for job in mine], at_once, device, ray):
        if event.error:
            failed[event.folder] = event.error
        elif event.progress and event.progress.undone:
            warnings.warn(f"{event.folder}: {event.progress.warning}", RuntimeWarning, stacklevel=2)
        if progress:
            progress(event)
    if failed:
        raise UsageError(
            f"{len(failed)} of {len(mine)} runs failed", "grid", f"The first: {next(iter(failed.values()))}"
        )
    return [job.out for job in mine]


def run(
    folders: Sequence[Path], at_once: int | None = 1, device: str | None = None, ray: Cluster | None = None
) -> Generator[Event]:
    """Train the jobs of these folders here, or on a cluster, until all are done or have failed."""
    return run_there(folders, ray, at_once, device) if ray else run_here(folders, at_once, device)


def run_there(
    folders: Sequence[Path], cluster: Cluster, at_once: int | None = 1, device: str | None = None
) -> Generator[Event]:
    """`run_here` on a cluster. Yields the ends of jobs; no steps."""
    todo = list[Path]()
    for folder in folders:
        if is_done(folder):
            yield Event(folder, done=True)
        else:
            todo.append(folder.absolute())
    work = partial(answers, at_once=at_once, device=device)
    for which, how, error in spread(list(map(str, todo)), work, cluster, at_once or 1):
        where = "" if str(todo[which]) in error else todo[which]
        yield Event(todo[which], how == DONE, how == HELD, UsageError(error, where) if error else None)
