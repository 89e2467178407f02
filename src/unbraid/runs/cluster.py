"""Work on a Ray cluster (Apache-2.0, https://docs.ray.io): tasks whose results are in folders, tried again when their worker is lost.

All that counts is in the folders, so nothing is kept in Ray: a driver that was killed is started again, and submits what is not
done. Ray runs a task at least once, and may run it again beside a worker that is not quite dead; the leases of the folders keep the
two apart.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from safetensors import SafetensorError

from unbraid.common.errors import UsageError, first_line
from unbraid.runs import pace

LOCAL = "local"
AHEAD = 1000  # tasks that Ray knows of at a time, so that a cluster that can grow sees what is wanted
DONE, HELD, FAILED = "done", "held", "failed"
# Number of the item in its task; DONE, HELD (another worker has it) or FAILED; the error, or what a result says.
Answer = tuple[int, str, str]
Work = Callable[[Sequence[Any]], Iterable[tuple[int, str, UsageError | str]]]  # some items → what became of each


@dataclass(frozen=True)
class Cluster:
    """Where and how work is done on Ray.

    `address`: `local`, a cluster of this machine alone that ends with the work; `auto`, the one that this machine belongs to; or its
    address. `gpus`, `cpus`: of each run, or of each group of `at_once` runs; a part of a card, such as 0.25, puts several runs on it.
    None: one card if the cluster has any. `retries`: how often a run is tried again after its worker was lost or its disk was full."""

    address: str = LOCAL
    gpus: float | None = None
    cpus: float = 1
    retries: int = 3


def spread(items: Sequence[Any], work: Work, cluster: Cluster, size: int = 1) -> Generator[tuple[int, str, str]]:
    """Do work on items on a cluster, `size` of them in a task, until all are done or have failed. Yields what becomes of
    each: its number, DONE, HELD (it comes again) or FAILED, and the text of `work`.

    `work` runs in the workers and must do nothing for an item that is done. Its errors are answers, but an OSError as on a full disk
    is tried again. Uses Ray as it is if it is connected already. UsageError if Ray is missing or cannot be reached."""
    todo = list(range(len(items)))
    if not todo:
        return
    ray, ours = _connected(cluster)
    tasks, held, looked = dict[Any, list[int]](), list[int](), time.monotonic()
    try:
        task = _task(ray, cluster)
        while todo or tasks or held:
            if held and time.monotonic() - looked > pace.LOOK_AGAIN:
                todo, held, looked = [*todo, *held], [], time.monotonic()
            while todo and len(tasks) < AHEAD:
                some, todo = todo[:size], todo[size:]
                tasks[task.remote(work, [items[i] for i in some], pace.TRY_AGAIN)] = some
            for one in _wait(ray, list(tasks)):
                for which, how, text in _ended(ray, one, tasks.pop(one), cluster.retries):
                    held += [which] if how == HELD else []
                    yield which, how, text
    finally:
        for one in tasks:
            with suppress(ray.exceptions.RayError, ValueError):
                ray.cancel(one, force=True)
        if ours:
            ray.shutdown()


def _wait(ray: Any, tasks: list[Any]) -> list[Any]:
    """A task that has ended; none if it takes longer than a look at the work of other workers may be put off."""
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
    """`at_work` as a Ray task. `max_calls=0`: a worker that has done a task stays, and so does its base."""
    there = ray.cluster_resources()
    gpus = cluster.gpus if cluster.gpus is not None else float(there.get("GPU", 0) > 0)
    for wanted, name, option in ((gpus, "GPU", "--gpus"), (cluster.cpus, "CPU", "--cpus")):
        if cluster.address == LOCAL and wanted > there.get(name, 0):
            raise UsageError(f"a run needs {wanted:g}, this machine has {there.get(name, 0):g}", option, "Give less.")
    tries: dict[str, Any] = {"max_retries": cluster.retries, "retry_exceptions": [OSError]}
    return ray.remote(num_cpus=cluster.cpus, num_gpus=gpus, max_calls=0, **tries)(at_work)


@cache
def _first_cards() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _keep_cards() -> None:
    """End a process that Ray has given another card than before: torch stays with the first. Ray tries again in a new process."""
    if _first_cards() != os.environ.get("CUDA_VISIBLE_DEVICES") and torch.cuda.is_initialized():
        os._exit(1)


def at_work(work: Work, items: Sequence[Any], pause: float) -> list[Answer]:
    """Do work in a worker process of the cluster. OSError, after `pause` seconds, if the disk was full or the like: tried again."""
    _keep_cards()
    found, broken = list[Answer](), ""
    for which, how, text in work(items):
        found.append((which, how, str(text)))
        if isinstance(text, UsageError) and isinstance(text.__cause__, OSError | SafetensorError):
            broken = str(text)
    if broken:
        time.sleep(pause)
        raise OSError(broken)
    return found


def _ended(ray: Any, task: Any, items: Sequence[int], retries: int) -> Generator[tuple[int, str, str]]:
    """What became of the items of a task."""
    try:
        for which, how, text in ray.get(task):
            yield items[which], how, text
    except ray.exceptions.RayTaskError as error:
        why = str(UsageError(first_line(error.cause or error), fix="The same command goes on."))
        yield from ((which, FAILED, why) for which in items)
    except ray.exceptions.RayError as error:
        what = f"its worker was lost {retries + 1} times ({type(error).__name__})"
        why = str(UsageError(what, fix="Is there enough memory? The same command goes on."))
        yield from ((which, FAILED, why) for which in items)
