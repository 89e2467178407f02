"""Several runs in several processes. The runs are dealt out in turn, and so are the cards if there are several."""

import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from unbraid.common.errors import UsageError
from unbraid.runs.batch import check_folders, run_many, write_jobs
from unbraid.runs.job import Job, Progress, finished

Event = tuple[int, Progress | UsageError]


def run_spread(
    jobs: Sequence[Job], processes: int, at_once: int | None = None, resume: bool = False, device: str = ""
) -> Generator[Event]:
    """`run_many` in `processes` processes. The events carry no figures of steps.

    If a process dies before its jobs are finished, each of these jobs yields an error."""
    if processes < 1:
        raise UsageError(f"{processes} processes", "--processes", "Give 1 or more.")
    check_folders(jobs, resume)
    write_jobs(jobs)
    context = multiprocessing.get_context("spawn")
    shares = [share for i in range(processes) if (share := {n: jobs[n] for n in range(i, len(jobs), processes)})]
    threads = max(1, (os.cpu_count() or 1) // len(shares))
    workers: dict[Any, tuple[Any, Mapping[int, Job]]] = {}
    try:
        for share, where in zip(shares, cards(len(shares), device), strict=True):
            ours, theirs = context.Pipe(duplex=False)
            given = (share, where, at_once, resume, threads, os.getpid(), theirs)
            process = context.Process(target=_work, args=given, daemon=True)
            workers[ours] = process, share
            process.start()
            theirs.close()  # so that the pipe closes when the process ends
        yield from _received(dict(workers))
    finally:
        for process, _ in workers.values():
            if process.pid:
                process.terminate()
                process.join()


def cards(count: int, device: str = "") -> list[str]:
    """A device for each of `count` processes: `device` if given, else the cards in turn.

    Without cards it is an empty string, which means the best device."""
    there = torch.cuda.device_count()
    return [device or (f"cuda:{i % there}" if there else "") for i in range(count)]


def _received(workers: dict[Any, tuple[Any, Mapping[int, Job]]]) -> Generator[Event]:
    """The events of all processes, as they come.

    Each process has its own pipe. With a shared queue, a process killed while writing would hold the lock for ever."""
    while workers:
        ready: list[Any] = multiprocessing.connection.wait(list(workers))
        for pipe in ready:
            try:
                yield pipe.recv()
            except (EOFError, OSError):  # the process has ended, maybe in the middle of a message
                process, share = workers.pop(pipe)
                process.join()
                what = f"its process ended with {process.exitcode}"
                fix = "Too little memory may be why: give fewer --processes, and --resume."
                unfinished = (n for n, job in share.items() if process.exitcode and not finished(job))
                yield from ((n, UsageError(what, share[n].out, fix)) for n in unfinished)


def _work(
    share: Mapping[int, Job], device: str, at_once: int | None, resume: bool, threads: int, parent: int, pipe: Any
) -> None:
    """Train a share of the jobs in a separate process, and send the events.

    It stops if its parent has died: otherwise it would go on unnoticed."""
    torch.set_num_threads(threads)
    numbers = list(share)
    for which, event in run_many(list(share.values()), at_once, resume, device or None):
        if os.getppid() != parent:
            return
        pipe.send((numbers[which], event if isinstance(event, UsageError) else replace(event, step=None)))
