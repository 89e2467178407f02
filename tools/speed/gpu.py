"""Measures a training step at SDXL's size on a GPU, run in several ways in one process: `python -m tools.speed gpu`.

The ways: eager (Python launches every kernel), CUDA graphs, compiled transformer blocks, and both together. Weights are
random. The table also has the share of time in which the GPU computes, and TFLOP/s, to be compared with those of a plain
bf16 matrix product.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tools.speed.cases import CASES
from tools.speed.time import attached, roles_of
from tools.speed.workload import Workload
from unbraid.bases.base import RunData
from unbraid.bases.compiling import compile_blocks, uncompiled
from unbraid.bases.presets import MAX
from unbraid.bench.measure import wait
from unbraid.bench.rows.cost import ATTENTION_FLOPS
from unbraid.core.adapters import Adapters
from unbraid.core.graphs import WARM
from unbraid.core.recipe import Recipe
from unbraid.core.state import State, Step
from unbraid.core.train import precomputed_targets, train

RUNS = (("split", 1024), ("zip", 1024), ("pair", 512))
STEPS, PROFILED = 12, 3  # numbers of steps that are timed, and that are profiled
WAYS = {"eager": (False, False), "graphs": (True, False), "compiled": (False, True), "compiled, graphs": (True, True)}


@dataclass(frozen=True)
class Speed:
    """One step: seconds, `busy` (the share of them in which the GPU computes), TFLOP. The run: `first` (seconds before the
    measured steps), peak GB."""

    seconds: float
    busy: float
    tflop: float
    first: float
    peak: float


def ways(name: str, workload: Workload, chosen: Sequence[str]) -> Iterator[tuple[str, Speed]]:
    """Yield (way, speed) of one method's steps, for each chosen way."""
    recipe = CASES[name].ours(workload.rank, CASES[name].steps)
    for way, (graphs, compiled) in ((one, WAYS[one]) for one in chosen):
        torch.cuda.empty_cache()
        if compiled:
            compile_blocks(workload.base.denoiser)
        with nullcontext() if compiled else uncompiled(workload.base.denoiser):
            yield way, _speed(name, workload, recipe, graphs)


def _speed(name: str, workload: Workload, recipe: Recipe, graphs: bool) -> Speed:
    torch.cuda.reset_peak_memory_stats()
    with _steps(name, workload, recipe, graphs) as going:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
            begun = _seconds(lambda: next(going))
        begun += _seconds(lambda: list(islice(going, WARM + 1)))  # with graphs, the last one is replayed
        seconds = _seconds(lambda: list(islice(going, STEPS))) / STEPS
        with profile(activities=[ProfilerActivity.CUDA]) as watched:
            spent = _seconds(lambda: list(islice(going, PROFILED)))
        computing = sum(event.self_device_time_total for event in watched.key_averages()) / 1e6
    peak = torch.cuda.max_memory_allocated() / 1e9
    return Speed(seconds, computing / spent, counter.get_total_flops() / 1e12, begun, peak)


@contextmanager
def _steps(name: str, workload: Workload, recipe: Recipe, graphs: bool) -> Iterator[Iterator[Step]]:
    base, case = replace(workload.base, graphs=graphs), CASES[name]
    with attached(case, workload) as adapters:
        state = State.fresh(adapters, recipe, torch.Generator().manual_seed(0))
        yield _training(RunData(base, workload.encode(roles_of(recipe)), workload.prompts), recipe, state, adapters)


def _training(run_data: RunData, recipe: Recipe, state: State, adapters: Adapters) -> Iterator[Step]:
    targets = precomputed_targets(run_data, recipe, adapters, state.rng) if recipe.passes.fixed_teachers else None
    return train(run_data, recipe, state, MAX.at_once, targets)


def whole_run(name: str, workload: Workload, graphs: bool = True) -> tuple[float, float]:
    """(seconds, peak GB on the GPU) of a whole run, without loading the base, drawing pictures and writing files."""
    recipe = CASES[name].ours(workload.rank, CASES[name].steps)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with _steps(name, workload, recipe, graphs) as going:
        seconds = _seconds(lambda: list(going))
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def product(side: int = 8192, times: int = 20) -> float:
    """TFLOP/s of bf16 products of square matrices, the most that can be expected of the card."""
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    _ = a @ b  # the first call is slower
    return 2e-12 * side**3 * times / _seconds(lambda: [a @ b for _ in range(times)])


def _seconds(run: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began
