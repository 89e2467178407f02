"""Runs that are interrupted at random moments, or whose disk is full: resumed, they give the same LoRAs."""

import json
import os
import random
import resource
import shutil
import signal
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from tools.chaos.child import Ended, start, wait
from unbraid.common.errors import UsageError
from unbraid.methods import METHODS
from unbraid.runs import folder, pace, shortest
from unbraid.runs.batch import run_many
from unbraid.runs.job import Job, finished
from unbraid.runs.run import run

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ROUNDING = (
    2e-2  # of the norm: what a batch may differ by, because its jobs are resumed at different steps (docs/batch.md)
)
LONGEST = 900.0  # seconds that a whole run may take on a busy machine


class Kills:
    """Cases on one base. The result of each uninterrupted run is kept, for comparison with the interrupted ones."""

    def __init__(self, base: Path, given: shortest.Material, work: Path, steps: tuple[int, int]) -> None:
        self.base, self.given, self.work, self.steps = base, given, work, steps
        self.whole: dict[str, float] = {}  # name of an uninterrupted run → seconds that it took
        self.worst = 0.0  # the largest difference of a batch
        self.interrupted = 0  # processes that a signal ended, or asked to end, before they were done
        work.mkdir(parents=True, exist_ok=True)

    def jobs(self, method: str, out: Path, steps: int) -> list[Job]:
        """The jobs of a method, or of a batch of three methods."""
        if method == "batch":
            names = ("unziplora", "dreambooth", "pair")
            return [job for i, name in enumerate(names) for job in self.jobs(name, out, max(2, steps - 7 * i))]
        options = {"base": str(self.base), "previews": 0, "seed": 1}
        options["fine_tune" if method == "make" else "steps"] = steps
        if method == "np-lora":
            del options["steps"]
        return shortest.jobs(method, self.given, out, **options)

    def begin(self, jobs: Sequence[Job], log: Path, limit: int = 0) -> int:
        """Train jobs in a child; those that have begun are resumed. `limit`: bytes that a file may have."""

        def work() -> int:
            torch.set_num_threads(1)
            pace.SAVE_EVERY = 0.1
            try:
                if len(jobs) > 1 and jobs[0].method != jobs[1].method:
                    events = run_many(jobs, 2, any((job.out / folder.RECORD).exists() for job in jobs), "cpu")
                    failed = [event for _, event in events if isinstance(event, UsageError)]
                    if failed:
                        raise failed[0]
                for job in jobs if jobs[0].method == jobs[-1].method else ():
                    list(run(job, resume=(job.out / folder.RECORD).exists(), device="cpu"))
            except UsageError as error:
                os.write(2, f"unbraid: {error}".encode())
                return 1
            return 0

        return start(work, log, {resource.RLIMIT_FSIZE: limit} if limit else None)

    def reference(self, method: str, steps: int) -> tuple[Path, float]:
        """The folder of an uninterrupted run, and the seconds that it took."""
        name = f"whole-{method}-{steps}"
        if name not in self.whole:
            log = self.work / f"{name}.log"
            ended = wait(self.begin(self.jobs(method, self.work / name, steps), log), log, LONGEST)
            if ended.code:
                raise RuntimeError(f"{name} failed: {ended.text}")
            self.whole[name] = ended.seconds
        return self.work / name, self.whole[name]

    def case(self, rng: random.Random, number: int, full_disk: bool = False) -> tuple[str, str]:
        """One case: its name, and what was broken, or nothing."""
        method, steps = rng.choice([*METHODS, "batch"]), rng.choice(range(self.steps[0], self.steps[1] + 1, 20))
        whole, seconds = self.reference(method, steps)
        out = self.work / f"cut-{number}"
        jobs, log, name = self.jobs(method, out, steps), self.work / f"{number}.log", f"{method}, {steps} steps"
        problems = list[str]()
        for _ in range(rng.choice((1, 1, 2, 3))):
            if full_disk:
                name += f", files of {(limit := rng.randrange(500, 200_000))} bytes at most"
                ended = wait(self.begin(jobs, log, limit), log, LONGEST)
                problems += [] if ended.code in (0, 1) and ended.text.count("\n") == 0 else [_last(ended)]
            else:
                name += f", {(how := rng.choice(SIGNALS)).name} after {(moment := rng.uniform(0, seconds)):.2f} s"
                ended = _interrupted(self.begin(jobs, log), log, how, moment)
                self.interrupted += ended.code != 0
                problems += [] if ended.code in (0, 130, -how) else [_last(ended)]
            problems += half_written(out)
        ended = wait(self.begin(jobs, log), log, LONGEST)
        problems += [_last(ended)] if ended.code else [*half_written(out), *self.differences(jobs, whole, out)]
        if not problems:
            shutil.rmtree(out)
        return name, "; ".join(dict.fromkeys(problems))

    def differences(self, jobs: Sequence[Job], whole: Path, out: Path) -> Iterator[str]:
        """What of a finished run is not as in the uninterrupted one."""
        for job in jobs:
            if not finished(job):
                yield f"{job.out.name} is not finished"
                continue
            events = folder.read_events(job.out)
            if [event["step"] for event in events] != list(range(len(events))):
                yield f"{job.out.name}: the steps of the events are not in order"
            for file in job.out.glob("*.safetensors"):
                one, other = load_file(file), load_file(whole / job.out.relative_to(out) / file.name)
                if one.keys() != other.keys():
                    yield f"{file.name} has other tensors"
                elif not all(torch.equal(value, other[key]) for key, value in one.items()):
                    first, second = (torch.cat([some[key].flatten().float() for key in one]) for some in (one, other))
                    off = float((first - second).norm() / second.norm())
                    self.worst = max(self.worst, off)
                    if len({job.method for job in jobs}) == 1 or off > ROUNDING:
                        yield f"{job.out.name}/{file.name} is {off:.2g} of its norm off"


def _interrupted(pid: int, log: Path, how: signal.Signals, moment: float) -> Ended:
    time.sleep(moment)
    with suppress(ProcessLookupError):  # it may be done already
        os.kill(pid, how)
    return wait(pid, log, LONGEST)


def _last(ended: Ended) -> str:
    return f"exit {ended.code}: {' '.join(ended.text.split())[-200:]}"


def half_written(out: Path) -> Iterator[str]:
    """Files in a folder that are not whole. Temporary files, which the next run removes, do not count."""
    for path in (one for one in out.rglob("*") if one.is_file() and not one.name.startswith(".")):
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".toml":
                tomllib.loads(path.read_text("utf-8"))
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            elif path.suffix == ".png":
                Image.open(path).load()
        except Exception as error:  # noqa: BLE001 (any error means that the file is damaged)
            yield f"{path.name} is half-written: {error}"
