"""A grid on a Ray cluster (Apache-2.0, https://docs.ray.io): tasks that train job folders, tried again when their worker is lost.

All that counts is in the folders, so nothing is kept in Ray: a driver that was killed is started again, and submits what is not
done. Ray runs a task at least once, and may run it again beside a worker that is not quite dead; the leases of the folders keep the
two apart.
"""

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from unbraid.bases.base import Base
from unbraid.common.errors import UsageError, first_line
from unbraid.runs import pace
from unbraid.runs.batch import finder
from unbraid.runs.grid_worker import Event, run_once
from unbraid.runs.job import Job
from unbraid.runs.job_folder import is_done

LOCAL = "local"
AHEAD = 1000  # tasks that Ray knows of at a time, so that a cluster that can grow sees what is wanted
Answer = tuple[int, str, str]  # number of the folder in its task; "done", "held" or "failed"; the error


@dataclass(frozen=True)
class Cluster:
    """Where and how a grid runs on Ray.

    `address`: `local`, a cluster of this machine alone that ends with the grid; `auto`, the one that this machine belongs to; or its
    address. `gpus`, `cpus`: of each job, or of each group of `at_once` jobs; a part of a card, such as 0.25, puts several jobs on it.
    None: one card if the cluster has any. `retries`: how often a job is tried again after its worker was lost or its disk was full."""

    address: str = LOCAL
    gpus: float | None = None
    cpus: float = 1
    retries: int = 3


def run_there(
    folders: Sequence[Path], cluster: Cluster, at_once: int | None = 1, device: str | None = None
) -> Generator[Event]:
    """Train the jobs of these folders on a cluster until all are done or have failed. Yields their ends; no steps.

    Uses Ray as it is if it is connected already. UsageError if Ray is missing or cannot be reached."""
    size, todo = at_once or 1, list[Path]()
    for folder in folders:
        if is_done(folder):
            yield Event(folder, done=True)
        else:
            todo.append(folder.absolute())
    if not todo:
        return
    ray, ours = _connected(cluster)
    tasks, held, looked = dict[Any, list[Path]](), list[Path](), time.monotonic()
    try:
        train = _task(ray, cluster)
        while todo or tasks or held:
            if held and time.monotonic() - looked > pace.LOOK_AGAIN:
                todo, held, looked = [*todo, *held], [], time.monotonic()
            while todo and len(tasks) < AHEAD:
                some, todo = todo[:size], todo[size:]
                tasks[train.remote([str(folder) for folder in some], at_once, device, pace.TRY_AGAIN)] = some
            ready = _wait(ray, list(tasks))
            for task in ready:
                for event in _ended(ray, task, tasks.pop(task), cluster.retries):
                    held += [event.folder] if event.held else []
                    yield event
    finally:
        for task in tasks:
            with suppress(ray.exceptions.RayError, ValueError):
                ray.cancel(task, force=True)
        if ours:
            ray.shutdown()


def _wait(ray: Any, tasks: list[Any]) -> list[Any]:
    """A task that has ended; none if it takes longer than a look at the jobs of other workers may be put off."""
    if tasks:
        return ray.wait(tasks, timeout=pace.LOOK_AGAIN)[0]
    time.sleep(pace.LOOK_AGAIN)
    return []


def _connected(cluster: Cluster) -> tuple[Any, bool]:
    """Ray, connected to the cluster, and whether it was connected here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves workers beside any other program
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed", "--ray", "pip install 'unbraid[ray]'") from error
    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    local: dict[str, Any] = {"include_dashboard": False} if cluster.address == LOCAL else {}
    try:
        ray.init(cluster.address, **quiet, **local)
    except Exception as error:  # Ray raises no narrower one when a busy machine takes over 30 s to start it
        fix = "Give local, auto, or the address that `ray start --head` prints."
        raise UsageError(f"there is no cluster to be reached ({first_line(error)})", cluster.address, fix) from error
    return ray, True


def _task(ray: Any, cluster: Cluster) -> Any:
    """`_train` as a Ray task. `max_calls=0`: a worker that has trained a job stays, and so does its base."""
    there = ray.cluster_resources()
    gpus = cluster.gpus if cluster.gpus is not None else float(there.get("GPU", 0) > 0)
    for wanted, name, option in ((gpus, "GPU", "--gpus"), (cluster.cpus, "CPU", "--cpus")):
        if cluster.address == LOCAL and wanted > there.get(name, 0):
            raise UsageError(f"a run needs {wanted:g}, this machine has {there.get(name, 0):g}", option, "Give less.")
    tries: dict[str, Any] = {"max_retries": cluster.retries, "retry_exceptions": [OSError]}
    return ray.remote(num_cpus=cluster.cpus, num_gpus=gpus, max_calls=0, **tries)(_train)


@cache
def _finder(device: str | None) -> Callable[[Job], Base]:
    """One for each worker process, so that the base of its last job is still there for the next one."""
    return finder(device, most=1)


@cache
def _first_cards() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _keep_cards() -> None:
    """End a process that Ray has given another card than before: torch stays with the first. Ray tries again in a new process."""
    if _first_cards() != os.environ.get("CUDA_VISIBLE_DEVICES") and torch.cuda.is_initialized():
        os._exit(1)


def _train(folders: Sequence[str], at_once: int | None, device: str | None, pause: float) -> list[Answer]:
    """Train jobs in a worker process of the cluster. OSError, after `pause` seconds, if the disk was full or the like: tried again."""
    _keep_cards()
    found, broken = dict[int, Answer](), ""
    paths = list(map(Path, folders))
    for event in run_once(paths, at_once, _finder(device)):
        which = paths.index(event.folder)
        if event.error:
            found[which] = which, "failed", str(event.error)
            broken = str(event.error) if isinstance(event.error.__cause__, OSError | SafetensorError) else broken
        elif event.held or event.done:
            found[which] = which, "held" if event.held else "done", ""
    if broken:
        time.sleep(pause)
        raise OSError(broken)
    return list(found.values())


def _ended(ray: Any, task: Any, folders: Sequence[Path], retries: int) -> Generator[Event]:
    """What became of the jobs of a task."""
    try:
        for which, how, error in ray.get(task):
            yield Event(folders[which], how == "done", how == "held", UsageError(error) if error else None)
    except ray.exceptions.RayTaskError as error:
        what = first_line(error.cause or error)
        yield from (Event(folder, error=UsageError(what, fix="The same command goes on.")) for folder in folders)
    except ray.exceptions.RayError as error:
        what, fix = f"its worker was lost {retries + 1} times ({type(error).__name__})", "Is there enough memory?"
        yield from (Event(folder, error=UsageError(what, folder, fix)) for folder in folders)
