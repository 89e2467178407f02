"""Compares many jobs at once on one base with the same jobs one after the other: throughput, and whether the results are
equal. `python -m tools.speed.many`

Each job has its own picture, prompts and random numbers. Every round measures all ways, so that a slow minute affects all of
them; the figures are medians. On a CPU, time is CPU time of one thread. On a GPU (`--device cuda`), SDXL at full size with
random weights is measured too.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import typer
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from unbraid.bases.base import Base, Picture, RunData, joined, load
from unbraid.bases.devices import pick_device
from unbraid.bases.families import BLOCKS
from unbraid.bases.families.family import Prompt
from unbraid.bench.measure import SDXL
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.many import train_many
from unbraid.core.recipe import Recipe
from unbraid.core.state import State
from unbraid.core.train import train
from unbraid.methods.dreambooth import dreambooth
from unbraid.methods.pair import pair
from unbraid.methods.unziplora import unziplora

ROLES = ("image", "before", "after", "content", "style", "both")
SMALL = {  # SDXL's blocks at a quarter of its width
    **SDXL,
    "sample_size": 16,
    "block_out_channels": (80, 160, 320),
    "transformer_layers_per_block": (1, 2, 4),
    "attention_head_dim": (2, 4, 8),
    "norm_num_groups": 16,
    "cross_attention_dim": 512,
    "projection_class_embeddings_input_dim": 2816,
}
Start = Callable[[int], tuple[RunData, Recipe, State]]  # number of a job → the job


def recipes(rank: int, steps: int) -> dict[str, Recipe]:
    """Name for `--method` → recipe."""
    (split,) = unziplora(BLOCKS["sdxl"], rank=rank, steps=steps, window=1, sample_times=1, content_alone=0.5)
    (learn,) = dreambooth(BLOCKS["sdxl"], rank=rank, steps=steps)
    (pairs,) = pair(BLOCKS["sdxl"], rank=rank, steps=steps, style_from=0)
    return {"split": split, "learn": learn, "pair": pairs}


def random_base(config: Mapping[str, Any], device: str) -> Base:
    """A base with a UNet of SDXL's type and random weights. Its other parts are those of the embedded base; they are not
    used."""
    base = load("icons", device)
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**config)
    base.pipe.unet = unet.to(device, base.denoiser.dtype).requires_grad_(False).eval()
    return base


def starter(base: Base, recipe: Recipe) -> Start:
    """A function that starts job i, with its own pictures, prompts and noise. Its adapters are not attached to the model."""
    config = base.denoiser.config
    size = (config["in_channels"], config["sample_size"], config["sample_size"])
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]

    def start(i: int) -> tuple[RunData, Recipe, State]:
        rng = torch.Generator().manual_seed(i)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng).to(base.device)

        sizes = torch.full((6,), 8.0 * size[1], device=base.device)
        pictures = {role: [Picture(rand(*size), 0.1 * rand(*size).abs(), sizes)] for role in ROLES}
        prompts = {role: Prompt(rand(77, config["cross_attention_dim"]), rand(pooled)) for role in ROLES}
        adapters = Adapters.attach(base.denoiser, recipe.targets)
        try:
            state = State.fresh(adapters, recipe, torch.Generator().manual_seed(i))
        finally:
            adapters.detach()
        return RunData(base, pictures, prompts), recipe, state

    return start


def clock(device: torch.device) -> float:
    """The time in seconds: CPU time if the device is the CPU, else wall-clock time."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turn(start: Start, jobs: int) -> tuple[float, list[dict[str, Tensor]]]:
    """Seconds per step, without the first step of each job, in which memory is allocated; and the final states."""
    ready, spent = [start(i) for i in range(jobs)], 0.0
    for run_data, recipe, state in ready:
        state.adapters.attach_again()
        try:
            steps = train(run_data, recipe, state, 2)
            next(steps)
            began = clock(run_data.base.device)
            for _ in steps:
                pass
            spent += clock(run_data.base.device) - began
        finally:
            state.adapters.detach()
    return spent / jobs / (ready[0][1].steps - 1), [state.tensors() for _, _, state in ready]


def at_once(start: Start, jobs: int, number: int) -> tuple[float, list[dict[str, Tensor]]]:
    """Like `in_turn`, with `number` jobs at once. The first step of the first `number` jobs is not measured."""
    ready = [start(i) for i in range(jobs)]
    events, device = train_many(ready, joined, number), ready[0][0].base.device
    for _ in range(number):
        next(events)
    began = clock(device)
    for _, event in events:
        if isinstance(event, UsageError):
            raise event
    spent = clock(device) - began
    return spent / (jobs * ready[0][1].steps - number), [state.tensors() for _, _, state in ready]


def difference(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> float:
    """The relative difference between the adapters of each job in two runs; the largest over jobs."""
    found = []
    for first, second in zip(one, other, strict=True):
        names = [key for key in first if key.startswith("adapter/") and key.endswith((".up", ".down"))]
        a, b = (torch.cat([some[key].flatten().double() for key in names]) for some in (first, second))
        found.append(float((a - b).norm() / a.norm()))
    return max(found)


def compare(title: str, start: Start, jobs: int, steps: int, numbers: list[int], rounds: int) -> None:
    """Measure and print a table. The first round is not timed; it is a warm-up."""
    seconds: dict[int, list[float]] = {number: [] for number in (1, *numbers)}
    apart: dict[int, float] = {}
    for i in range(rounds + 1):
        spent, alone = in_turn(start, jobs)
        seconds[1] += [spent] if i else []
        for number in numbers:
            spent, together = at_once(start, jobs, number)
            seconds[number] += [spent] if i else []
            apart[number] = max(apart.get(number, 0.0), difference(alone, together))
    first = statistics.median(seconds[1])
    print(
        f"\n| {title}, {jobs} jobs of {steps} steps | ms per step of a job | throughput | difference |\n|---|---|---|---|"
    )
    for number, some in seconds.items():
        median = statistics.median(some)
        how, off = (f"{number} at once", f"{apart[number]:.0e}") if number > 1 else ("in turn", "")
        print(f"| {how} | {median * 1e3:.1f} | {first / median:.2f} | {off} |", flush=True)


def main(
    jobs: Annotated[int, typer.Option(help="How many jobs.")] = 8,
    numbers: Annotated[list[int], typer.Option("--at-once", help="How many jobs at once; repeatable.")] = [8],  # noqa: B006
    steps: int = 8,
    rounds: int = 3,
    rank: int = 16,
    only: Annotated[str, typer.Option(help="Only this base: icons, small or sdxl.")] = "",
    methods: Annotated[list[str], typer.Option("--method", help="split, learn, pair; repeatable.")] = ["split", "pair"],  # noqa: B006
    device: str = "",
) -> None:
    torch.set_num_threads(1)
    where = device or pick_device()
    name = torch.cuda.get_device_name() if where.startswith("cuda") else "CPU, one thread"
    print(f"{name}, torch {torch.__version__}")
    bases: dict[str, Callable[[], Base]] = {
        "icons": lambda: load("icons", where),
        "small": lambda: random_base(SMALL, where),
    }
    if where.startswith("cuda"):
        bases["sdxl"] = lambda: random_base(SDXL, where)
    for base_name, made in bases.items():
        if only and base_name != only:
            continue
        base = made()
        for method in methods:
            start = starter(base, recipes(rank, steps)[method])
            compare(f"{base_name}, {method}, rank {rank}", start, jobs, steps, numbers, rounds)


if __name__ == "__main__":
    typer.run(main)
