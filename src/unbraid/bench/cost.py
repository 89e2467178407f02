"""What a training costs: seconds, FLOPs, memory, trained parameters."""

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from unbraid.bases.base import load
from unbraid.bench.measure import ATTENTION_FLOPS
from unbraid.core.lora import Branch
from unbraid.core.recipe import Recipe
from unbraid.core.train import train
from unbraid.runs.job import Job, prompts_of
from unbraid.runs.run import Ready, opened_images, prepare

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Of one row on one cell, or of one part of it. Memory is the peak above what was there before (the base), trained
    parameters and FLOPs are those of trainings; None: not measured here."""

    seconds: float = 0.0
    flops: float = 0.0
    parameters: int = 0
    memory: int | None = None  # bytes
    file: int = 0  # bytes of what is loaded to draw

    def __add__(self, other: "Cost") -> "Cost":
        peaks = [peak for peak in (self.memory, other.memory) if peak is not None]
        return Cost(
            self.seconds + other.seconds,
            self.flops + other.flops,
            max(self.parameters, other.parameters),
            max(peaks, default=None),
            self.file + other.file,
        )


@contextmanager
def measured(cost: Cost) -> Iterator[None]:
    """Seconds and peak memory of what happens inside: the accelerator's, or this process's where the system tells (Linux). On a
    processor seconds are those that it worked, so that other processes do not count."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _reset_peak()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    yield
    cost.seconds += clock() - began
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
    cost.memory = None if peak is None or before is None else max(peak - before, 0)


def _reset_peak() -> int | None:
    """Make the process's peak memory count anew; what it uses now. None where that cannot be done."""
    if not os.access(CLEAR, os.W_OK):
        return None
    CLEAR.write_text("5")
    return _resident("VmRSS")


def _resident(what: str) -> int | None:
    if not STATUS.exists():
        return None
    line = next((one for one in STATUS.read_text().splitlines() if one.startswith(what)), None)
    return int(line.split()[1]) * 1024 if line else None


def counted(job: Job) -> Cost:
    """FLOPs of a whole training, and the parameters that it trains: one step of every kind is run under the counter."""
    ready = prepare(job, prompts_of(job), opened_images(job), load(job.base, loading=job.loading))
    kinds = Counter(ready.recipe.branches(i) for i in range(ready.recipe.steps))
    flops = sum(count * _step_flops(ready, branches) for branches, count in kinds.items())
    parameters = sum(p.numel() for group in ready.state.optimizer.param_groups for p in group["params"])
    return Cost(flops=float(flops), parameters=parameters)


def _step_flops(ready: Ready, branches: tuple[Branch, ...]) -> int:
    state, recipe = ready.state, ready.recipe
    one: Recipe = replace(recipe, branches=lambda step: branches, steps=state.step + 1, after_step=None, stop=None)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        for _ in train(ready.studies, one, state):
            pass
    return counter.get_total_flops()
