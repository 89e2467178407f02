"""What a training costs: seconds, FLOPs, memory, trained parameters."""

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from unbraid.bases.base import load
from unbraid.core.recipe import Recipe
from unbraid.core.train import train
from unbraid.runs.job import Job, opened_images, prompts_of
from unbraid.runs.prepare import Ready, prepare

aten = torch.ops.aten
ATTENTION_FLOPS: dict[Any, Any] = {  # torch's own formulas; its counter does not apply them to flash attention on a CPU
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_shape=None, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """The cost of one row on one cell, or of one part of it. Drawing is not included. `memory` is the peak above what was in use
    before (the base); None where it cannot be measured. `flops` and `parameters` count trainings alone."""

    seconds: float = 0.0
    flops: float = 0.0
    parameters: int = 0
    memory: int | None = None  # bytes
    file: int = 0  # bytes of the LoRA files that are drawn with

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
    """Add the seconds and set the peak memory of the code inside. With a GPU: wall-clock time and the GPU's memory. Without one: CPU time
    of this process, so that other processes do not disturb it, and its resident memory, where the system reports it (Linux)."""
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
    """Reset the process's peak memory; returns the bytes in use now, or None where the system does not allow it."""
    if not os.access(CLEAR, os.W_OK):
        return None
    CLEAR.write_text("5")
    return _resident("VmRSS")


def _resident(what: str) -> int | None:
    """A memory figure of this process in bytes, such as `VmRSS`; None where the system does not report it."""
    if not STATUS.exists():
        return None
    line = next((one for one in STATUS.read_text().splitlines() if one.startswith(what)), None)
    return int(line.split()[1]) * 1024 if line else None


def counted(job: Job) -> Cost:
    """FLOPs and trained parameters of a whole training. One step of each kind is run and counted, the rest is multiplication."""
    ready = prepare(job, prompts_of(job), opened_images(job), load(job.base, loading=job.loading))
    plan = [ready.recipe.branches(i) for i in range(ready.recipe.steps)]
    flops = sum(count * _step_flops(ready, plan.index(branches)) for branches, count in Counter(plan).items())
    parameters = sum(p.numel() for group in ready.state.optimizer.param_groups for p in group["params"])
    return Cost(flops=float(flops), parameters=parameters)


def _step_flops(ready: Ready, index: int) -> int:
    state, recipe = ready.state, ready.recipe
    state.step = index  # hooks go by the step: later ones may train fewer adapters
    one: Recipe = replace(recipe, steps=index + 1, hooks=replace(recipe.hooks, after_step=None), stop=None)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        for _ in train(ready.run_data, one, state):
            pass
    return counter.get_total_flops()
