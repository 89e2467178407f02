"""A training step at SDXL's size on a GPU, by the ways of running it, side by side in one process: `python -m tools.speed gpu`.

The ways: kernel by kernel from Python (eager), as CUDA graphs, with compiled transformer blocks, and compiled ones in graphs. Weights
are random. Beside the seconds stand the share of them in which the GPU computes, and its TFLOP/s beside those of a plain bf16 product.
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
from tools.speed.world import World
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
STEPS, PROFILED = 12, 3  # steps that are timed, and those that are watched
WAYS = {"eager": (False, False), "graphs": (True, False), "compiled": (False, True), "compiled, graphs": (True, True)}


@dataclass(frozen=True)
class Speed:
    """Of one step: seconds, the share of them in which the GPU computes, TFLOP; and of the run so far, seconds to the first measured step, peak GB."""

    seconds: float
    busy: float
    tflop: float
    first: float
    peak: float


def ways(name: str, world: World, chosen: Sequence[str]) -> Iterator[tuple[str, Speed]]:
    """Steps of one method, by the chosen ways."""
    recipe = CASES[name].ours(world.rank, CASES[name].steps)
    for way, (graphs, compiled) in ((one, WAYS[one]) for one in chosen):
        torch.cuda.empty_cache()
        if compiled:
            compile_blocks(world.base.denoiser)
        with nullcontext() if compiled else uncompiled(world.base.denoiser):
            yield way, _speed(name, world, recipe, graphs)


def _speed(name: str, world: World, recipe: Recipe, graphs: bool) -> Speed:
    torch.cuda.reset_peak_memory_stats()
    with _steps(name, world, recipe, graphs) as going:
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
def _steps(name: str, world: World, recipe: Recipe, graphs: bool) -> Iterator[Iterator[Step]]:
    base, case = replace(world.base, graphs=graphs), CASES[name]
    with attached(case, world) as adapters:
        state = State.fresh(adapters, recipe, torch.Generator().manual_seed(0))
        yield _training(RunData(base, world.encode(roles_of(recipe)), world.prompts), recipe, state, adapters)


def _training(run_data: RunData, recipe: Recipe, state: State, adapters: Adapters) -> Iterator[Step]:
    taught = precomputed_targets(run_data, recipe, adapters, state.rng) if recipe.passes.fixed_teachers else None
    return train(run_data, recipe, state, MAX.at_once, taught)


def whole_run(name: str, world: World, graphs: bool = True) -> tuple[float, float]:
    """(seconds, peak GB on the GPU) of a whole run, without loading, pictures and files."""
    recipe = CASES[name].ours(world.rank, CASES[name].steps)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with _steps(name, world, recipe, graphs) as going:
        seconds = _seconds(lambda: list(going))
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def product(side: int = 8192, times: int = 20) -> float:
    """TFLOP/s of bf16 products of square matrices: what the card does when it only multiplies."""
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    _ = a @ b  # once, to begin with
    return 2e-12 * side**3 * times / _seconds(lambda: [a @ b for _ in range(times)])


def _seconds(run: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began
