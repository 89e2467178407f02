"""Grids whose workers and drivers are killed, and whose disk is full: every job ends once, with the LoRAs of a plain run.

`python -m tools.chaos.grids` trains small jobs plainly, on a local Ray cluster that is broken again and again, in shares of which some are
killed, by two processes on all jobs, and undisturbed on Ray beside `batch`, for what a job costs there."""

import json
import multiprocessing
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer

from tools.chaos.verdict import differences, verdict
from unbraid.runs import grid, job_folder, pace
from unbraid.runs.api import learn_job
from unbraid.runs.batch import batch
from unbraid.runs.cluster import Cluster
from unbraid.runs.folder import RECORD
from unbraid.runs.grid_worker import share
from unbraid.runs.job import Job
from unbraid.runs.job_folder import DONE
from unbraid.runs.lease import PREFIX

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "src" / "unbraid" / "bases" / "icons" / "example.png"
FULL = 2000  # bytes that a file may have while the disk is "full"
Start = Callable[..., BaseProcess]
TASK = "ray::at_work"


def jobs(out: Path, count: int, steps: int, base: str = "icons") -> list[Job]:
    """Jobs that differ in their seeds."""
    given = {"rank": 2, "steps": steps, "lr": 1e-3, "previews": 0, "base": base}
    return [learn_job(PICTURE, prompt="a sks fox", out=out / f"{i:02d}", seed=i, **given) for i in range(count)]


def driver(how: str, todo: Sequence[Job], log: Path, more: str = "") -> BaseProcess:
    """Start a process that trains the jobs: `batch`, `ray`, or `shard`. `more`: the number of workers, or the share.

    It is a fork: a new Python would need longer to import the libraries than to train."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=drive, args=(how, todo, log, more), daemon=True)
    process.start()
    return process


def drive(how: str, todo: Sequence[Job], log: Path, more: str) -> None:
    """What a driver does."""
    with log.open("a") as text:
        os.dup2(text.fileno(), 1)
        os.dup2(text.fileno(), 2)
    pace.TRY_AGAIN, pace.LOOK_AGAIN = 1.0, 1.0
    if how == "batch":
        batch(todo, at_once=1, resume=True, device="cpu")
    elif how == "shard":
        grid.grid(todo, shard=more, device="cpu")
    else:
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
        import ray

        sizes = {"num_cpus": int(more), "num_gpus": int(more), "object_store_memory": 100_000_000}
        ray.init(**sizes, include_dashboard=False, log_to_driver=False)  # type: ignore[arg-type]
        try:
            grid.grid(todo, ray=Cluster(gpus=1, retries=100), device="cpu")
        finally:
            ray.shutdown()


def at_work(todo: Sequence[Job]) -> list[psutil.Process]:
    """The workers that are training a job now: their process ids are in the leases."""
    found = []
    for job in todo:
        for path in job.out.glob(f"{PREFIX}*"):
            with suppress(OSError, ValueError, psutil.Error):
                worker = psutil.Process(json.loads(path.read_bytes())["process"])
                if (job.out / RECORD).exists() and " ".join(worker.cmdline()).startswith(TASK):
                    found.append(worker)
    return found


def end(process: BaseProcess) -> None:
    """Kill a driver, and what is left of its cluster after some seconds."""
    if not process.is_alive():
        return  # its process id may be another process's by now
    tree = []
    with suppress(psutil.Error):
        tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    for one in psutil.wait_procs(tree, 20)[1]:
        with suppress(psutil.Error):
            one.kill()


class Watch:
    """What `done` looked like when it was first seen: a job that ends twice would write it, or its LoRAs, again."""

    def __init__(self, todo: Sequence[Job]) -> None:
        self.todo, self.seen = todo, dict[Path, tuple[int, int]]()

    def look(self) -> int:
        """How many are done."""
        for path in (one.out / DONE for one in self.todo if one.out / DONE not in self.seen):
            with suppress(OSError):
                self.seen[path] = path.stat().st_ino, path.stat().st_mtime_ns
        return len(self.seen)

    def again(self) -> Iterator[str]:
        for path, was in self.seen.items():
            files = [one for one in path.parent.glob("*.safetensors") if one.stat().st_mtime_ns > was[1]]
            if (path.stat().st_ino, path.stat().st_mtime_ns) != was or files:
                yield f"{path.parent.name} ended twice"


def broken_cluster(todo: Sequence[Job], start: Start, every: float, drivers: int, limit: float) -> dict[str, int]:
    """Train on Ray while workers are killed, and so many drivers, and the disk is full once. Returns how often what was done."""
    rng, watch, done = random.Random(1), Watch(todo), {"workers killed": 0, "drivers killed": 0, "disks full": 0}
    process, kill, begin = start(), time.monotonic(), time.monotonic()
    try:
        while process.is_alive() or watch.look() < len(todo):
            time.sleep(0.2)
            count, working = watch.look(), at_work(todo)
            if not process.is_alive() and count < len(todo):
                done["drivers started again"] = done.get("drivers started again", 0) + 1
                process = start()
            elif done["drivers killed"] < drivers and count > len(todo) * (1 + done["drivers killed"]) / (drivers + 1):
                done["drivers killed"] += process.is_alive()
                end(process)
            elif not done["disks full"] and count > len(todo) / 6 and working:
                done["disks full"] += _full(working, todo)
            elif time.monotonic() > kill and working:
                with suppress(psutil.Error):
                    rng.choice(working).kill()
                    done["workers killed"] += 1
                kill = time.monotonic() + every
            if time.monotonic() - begin > limit:
                raise RuntimeError(f"{count} of {len(todo)} jobs after {limit} s")
    finally:
        end(process)
    done["ended twice"] = len(list(watch.again()))
    return done


def _full(working: Sequence[psutil.Process], todo: Sequence[Job]) -> int:
    """Let the workers write only small files until one has failed of it, or ten seconds. Returns 1 if one failed."""
    for one in working:
        with suppress(psutil.Error, OSError):
            resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))
    until, failed = time.monotonic() + 10, False
    while time.monotonic() < until and not failed:
        time.sleep(0.1)
        failed = any((one.out / job_folder.FAILED).exists() for one in todo)
    for one in working:
        with suppress(psutil.Error, OSError):
            resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return int(failed)


def broken_shares(todo: Sequence[Job], start: Start, shares: Sequence[str], limit: float) -> dict[str, int]:
    """Train in shares, all but the last of which are killed once they have done a job, and started again.

    Without shares: two processes on all jobs, as if by mistake, and none is killed."""
    watch, begin, killed = Watch(todo), time.monotonic(), set[int]()
    processes = [start(one) for one in shares or ("", "")]
    while any(process.is_alive() for process in processes):
        time.sleep(0.2)
        watch.look()
        for i, one in enumerate(shares[:-1]):
            first, step = share(one)
            ended = [(job.out / DONE).exists() for job in todo[first::step]]
            if i not in killed and any(ended) and not all(ended):
                end(processes[i])
                processes[i] = start(one)
                killed.add(i)
        if time.monotonic() - begin > limit:
            raise RuntimeError(f"{watch.look()} of {len(todo)} jobs after {limit} s")
    return {"killed": len(killed), "done": watch.look(), "ended twice": len(list(watch.again()))}


def between(todo: Sequence[Job], file: str) -> float:
    """Seconds from one job's end to the next one's, on average: what a job costs when the base is loaded."""
    ends = sorted((job.out / file).stat().st_mtime for job in todo)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def main(
    work: Annotated[Path, typer.Option(help="Folder; what is done in it is not done again.")] = Path("chaos-grid"),
    count: Annotated[int, typer.Option("--jobs")] = 24,
    steps: int = 20,
    workers: int = 3,
    every: Annotated[float, typer.Option(help="Seconds between kills of a worker.")] = 4.0,
    drivers: Annotated[int, typer.Option(help="How often the driver is killed.")] = 2,
    base: str = "icons",
    limit: Annotated[float, typer.Option(help="Seconds that a part may take.")] = 1800.0,
    only: Annotated[str, typer.Option(help="ray, shards, two (on all jobs) or overhead.")] = "",
) -> None:
    """Exit status 1 if a job ended twice, or has other LoRAs than a plain run."""
    work.mkdir(parents=True, exist_ok=True)
    wrong, total = 0, Counter[str]()

    def start(how: str, where: str, more: str = "", some: int = count) -> BaseProcess:
        return driver(how, jobs(work / where, some, steps, base), work / f"{where}.log", more)

    start("batch", "plain").join()
    shares = {"shards": ("0/3", "1/3", "2/3"), "two": ()}
    for name in ("ray", *shares):
        if only in ("", name):
            todo, begin = jobs(work / name, count, steps, base), time.monotonic()
            if name == "ray":
                happened = broken_cluster(todo, lambda: start("ray", "ray", str(workers)), every, drivers, limit)
            else:
                happened = broken_shares(todo, partial(start, "shard", name), shares[name], limit)
            other = differences(todo, work / "plain")
            wrong += len(other) + happened["ended twice"]
            print(f"{name}: {happened}; other LoRAs: {other}; {time.monotonic() - begin:.0f} s", flush=True)
            total.update({**happened, "jobs": count, "other": len(other)})
    if only in ("", "overhead"):
        _overhead(start, jobs(work / "one", few := min(count, 6), steps, base), jobs(work / "beside", few, steps, base))
    if total:
        print(verdict(total))
    raise typer.Exit(bool(wrong))


def _overhead(start: Start, there: Sequence[Job], here: Sequence[Job]) -> None:
    """Print what a job costs on Ray and in `batch`, one worker each, and of that outside the training."""
    for how, where, todo, last in (("batch", "beside", here, "loss.png"), ("ray", "one", there, DONE)):
        start(how, where, "1", len(todo)).join()
        trained = sum(job_folder.figures(job.out)["seconds"] for job in todo[1:]) / (len(todo) - 1)
        took = between(todo, last)
        print(f"overhead, {how}: {took:.2f} s a job, {trained:.2f} s of it training, {took - trained:.2f} s not")


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
