"""Measures seconds per training step, for our form and the published form, in one process."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice

import torch

from tools.speed.cases import CASES, Case, random_adapters
from tools.speed.published import dense_sum, published
from tools.speed.workload import Workload
from unbraid.bases.base import RunData
from unbraid.bases.compiling import compile_blocks, uncompiled
from unbraid.bases.presets import MAX
from unbraid.bench.measure import Way, side_by_side, wait
from unbraid.core.adapters import Adapters
from unbraid.core.recipe import Recipe
from unbraid.core.state import State
from unbraid.core.train import precomputed_targets, train

WARM = 17  # steps of `split` before the measurement, so that it begins after the window in which channels are scored


def timed(name: str, workload: Workload, steps: int, rounds: int, warm: int = WARM) -> list[tuple[str, float]]:
    """(name, median seconds per step), the published step first."""
    case = CASES[name]
    length = case.steps if name == "split" else steps  # the schedule of `split` depends on the length of the run
    warm = warm if name == "split" else 0
    recipe, theirs = case.ours(workload.rank, length), case.published(workload.rank, length)
    ways = {"published": _theirs(case, workload, theirs, steps, warm, case.checkpointing)}
    if case.checkpointing:
        ways["published, no gradient checkpointing"] = _theirs(case, workload, theirs, steps, warm, False)
    ways["ours"] = _ours(case, workload, recipe, steps, warm)
    if recipe.passes.fixed_teachers:
        ways["ours, teachers precomputed"] = _ours(case, workload, recipe, steps, warm, ahead=True)
    return side_by_side(ways, steps, rounds)


def one_by_one(name: str, workload: Workload, steps: int, rounds: int) -> list[tuple[str, float]]:
    """(name, median seconds per step) with 1, 2 and 4 branches per pass, as far as the method has them. The presets'
    `at_once` was chosen from these figures."""
    case = CASES[name]
    recipe = case.ours(workload.rank, steps)
    most = max(len(recipe.branches(i)) for i in range(steps))
    ways = {
        f"{n} in a pass": _ours(case, workload, recipe, steps, 0, at_once=n)
        for n in (1, 2, 4)
        if n < 2 * most or n == 1
    }
    return side_by_side(ways, steps, rounds)


def compiled(name: str, workload: Workload, steps: int, rounds: int) -> tuple[float, list[tuple[str, float]]]:
    """Seconds that the first step of a compiled run takes, and (name, median seconds per step) without and with
    compilation."""
    case, unet = CASES[name], workload.base.denoiser
    length = case.steps if name == "split" else steps + 2
    way = _ours(case, workload, case.ours(workload.rank, length), steps, 2)

    @contextmanager
    def plain() -> Iterator[Callable[[], None]]:
        with uncompiled(unet), way() as go:
            yield go

    compile_blocks(unet)
    try:
        began = time.perf_counter()
        with _ours(case, workload, case.ours(workload.rank, length), 1, 0)() as go:
            go()
        first = time.perf_counter() - began
        return first, side_by_side({"not compiled": plain, "compiled": way}, steps, rounds)
    finally:
        for block in unet.modules():
            block._compiled_call_impl = None


def roles_of(recipe: Recipe) -> list[str]:
    """The picture roles of a recipe's steps."""
    return sorted({branch.image for i in (0, recipe.steps - 1) for branch in recipe.branches(i)})


@contextmanager
def attached(case: Case, workload: Workload, checkpointing: bool = False) -> Iterator[Adapters]:
    """Attach adapters to the UNet inside the `with` block; afterwards the UNet is unchanged."""
    unet = workload.base.denoiser
    adapters = Adapters.attach(unet)
    try:
        if case.form is dense_sum:  # ZipLoRA starts from existing LoRAs
            random_adapters(case, adapters, workload.rank, mergers=False)
            for layer in adapters.layers.values():
                layer.to(workload.base.device)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        yield adapters
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
        adapters.detach()


def _theirs(case: Case, workload: Workload, recipe: Recipe, steps: int, warm: int, checkpointing: bool) -> Way:
    @contextmanager
    def way() -> Iterator[Callable[[], None]]:
        with attached(case, workload, checkpointing) as adapters:
            recipe.prepare(adapters, torch.Generator().manual_seed(0))
            roles = roles_of(recipe)
            loop = published(
                workload.base, lambda: workload.encode(roles), workload.prompts, recipe, adapters, case.form
            )
            with closing(loop):
                for _ in islice(loop, warm):
                    pass

                def go() -> None:
                    for _ in islice(loop, steps):
                        pass
                    wait()

                yield go

    return way


def _ours(
    case: Case,
    workload: Workload,
    recipe: Recipe,
    steps: int,
    warm: int,
    ahead: bool = False,
    at_once: int = MAX.at_once,
) -> Way:
    @contextmanager
    def way() -> Iterator[Callable[[], None]]:
        with attached(case, workload) as adapters:
            state = State.fresh(adapters, recipe, torch.Generator().manual_seed(0))
            run_data = RunData(workload.base, workload.encode(roles_of(recipe)), workload.prompts)
            going = train(run_data, recipe, state, at_once)
            for _ in islice(going, warm):
                pass

            def go() -> None:
                targets = precomputed_targets(run_data, recipe, adapters, state.rng) if ahead else None
                for _ in islice(train(run_data, recipe, state, at_once, targets) if ahead else going, steps):
                    pass
                wait()

            yield go

    return way
