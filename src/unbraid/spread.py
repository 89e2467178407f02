"""Several runs in several processes, dealt out in turn; where there are several cards, each process has one of them."""

import multiprocessing
import os
import queue
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from unbraid.errors import UsageError
from unbraid.job import Job, Progress
from unbraid.runs import distinct, run_many

Event = tuple[int, Progress | UsageError]
LOOK = 1.0  # seconds between looks at whether the processes are alive


def run_spread(
    jobs: Sequence[Job], processes: int, at_once: int | None = None, resume: bool = False, device: str = ""
) -> Generator[Event]:
    """`runs.run_many` in so many processes. What happens comes without the figures of steps. The jobs of a process that ends before
    they do end with an error."""
    if processes < 1:
        raise UsageError(f"{processes} processes", "--processes", "Give 1 or more.")
    distinct(jobs)
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    shares = [share for i in range(processes) if (share := {n: jobs[n] for n in range(i, len(jobs), processes)})]
    threads = max(1, (os.cpu_count() or 1) // len(shares))
    working = []
    for share, where in zip(shares, cards(len(shares), device), strict=True):
        given = (share, where, at_once, resume, threads, os.getpid(), events)
        working.append(context.Process(target=_work, args=given, daemon=True))
        working[-1].start()
    try:
        yield from _told(working, events, shares)
    finally:
        for process in working:
            process.terminate()
            process.join()


def cards(count: int, device: str = "") -> list[str]:
    """A device for each of `count` processes: the cards in turn, or the one that is asked for; empty: the best that there is."""
    there = torch.cuda.device_count()
    return [device or (f"cuda:{i % there}" if there else "") for i in range(count)]


def _told(working: Sequence[Any], events: Any, shares: Sequence[Mapping[int, Job]]) -> Generator[Event]:
    going = dict(enumerate(working))
    while going:
        dead = [who for who, process in going.items() if not process.is_alive()]
        try:
            while True:  # first what is there: a process may have ended just now
                who, event = events.get(timeout=0 if dead else LOOK)
                if event is None:
                    going.pop(who).join()
                    break
                yield event
        except queue.Empty:
            pass
        for who in dead:
            if who in going:
                process, share = going.pop(who), shares[who]
                what = f"its process ended with {process.exitcode}"
                fix = "Too little memory may be why: give fewer --processes, and --resume."
                yield from ((n, UsageError(what, job.out, fix)) for n, job in share.items())


def _work(
    share: Mapping[int, Job], device: str, at_once: int | None, resume: bool, threads: int, parent: int, events: Any
) -> None:
    """In a process of its own. Without its parent it stops: nobody would know that it goes on."""
    torch.set_num_threads(threads)
    numbers, who = list(share), min(share)
    for which, event in run_many(list(share.values()), at_once, resume, device or None):
        if os.getppid() != parent:
            return
        light = event if isinstance(event, UsageError) else replace(event, step=None)
        events.put((who, (numbers[which], light)))
    events.put((who, None))
