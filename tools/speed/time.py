"""Seconds of a training step, ours and the published form side by side in one process."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice

import torch

from tools.speed.cases import CASES, Case, random_adapters
from tools.speed.published import dense_sum, published
from tools.speed.world import World
from unbraid.bases.base import RunData
from unbraid.bases.compiling import compile_blocks, uncompiled
from unbraid.bases.presets import MAX
from unbraid.bench.measure import Way, side_by_side, wait
from unbraid.core.adapters import Adapters
from unbraid.core.recipe import Recipe
from unbraid.core.state import State
from unbraid.core.train import precomputed_targets, train

WARM = 17  # steps of `split` before the clock starts: past the window in which channels are scored


def timed(name: str, world: World, steps: int, rounds: int, warm: int = WARM) -> list[tuple[str, float]]:
    """(name, median seconds per step), the published step first."""
    case = CASES[name]
    length = (
        case.steps if name == "split" else steps
    )  # its calendar is that of a whole run; the others are whole runs in small
    warm = warm if name == "split" else 0
    recipe, theirs = case.ours(world.rank, length), case.published(world.rank, length)
    ways = {"published": _theirs(case, world, theirs, steps, warm, case.checkpointing)}
    if case.checkpointing:
        ways["published, no gradient checkpointing"] = _theirs(case, world, theirs, steps, warm, False)
    ways["ours"] = _ours(case, world, recipe, steps, warm)
    if recipe.passes.fixed_teachers:
        ways["ours, teachers asked ahead"] = _ours(case, world, recipe, steps, warm, ahead=True)
    return side_by_side(ways, steps, rounds)


def one_by_one(name: str, world: World, steps: int, rounds: int) -> list[tuple[str, float]]:
    """The same step with 1, 2 and more of its branches in a pass, as far as it has so many: by which `at_once` of the presets is chosen."""
    case = CASES[name]
    recipe = case.ours(world.rank, steps)
    most = max(len(recipe.branches(i)) for i in range(steps))
    ways = {
        f"{n} in a pass": _ours(case, world, recipe, steps, 0, at_once=n) for n in (1, 2, 4) if n < 2 * most or n == 1
    }
    return side_by_side(ways, steps, rounds)


def compiled(name: str, world: World, steps: int, rounds: int) -> tuple[float, list[tuple[str, float]]]:
    """Seconds until a compiled run has taken its first step, and (name, median seconds per step) without and with compilation."""
    case, unet = CASES[name], world.base.denoiser
    length = case.steps if name == "split" else steps + 2
    way = _ours(case, world, case.ours(world.rank, length), steps, 2)

    @contextmanager
    def plain() -> Iterator[Callable[[], None]]:
        with uncompiled(unet), way() as go:
            yield go

    compile_blocks(unet)
    try:
        began = time.perf_counter()
        with _ours(case, world, case.ours(world.rank, length), 1, 0)() as go:
            go()
        first = time.perf_counter() - began
        return first, side_by_side({"not compiled": plain, "compiled": way}, steps, rounds)
    finally:
        for block in unet.modules():
            block._compiled_call_impl = None


def roles_of(recipe: Recipe) -> list[str]:
    return sorted({branch.image for i in (0, recipe.steps - 1) for branch in recipe.branches(i)})


@contextmanager
def attached(case: Case, world: World, checkpointing: bool = False) -> Iterator[Adapters]:
    """Adapters on the world's UNet, which is afterwards what it was."""
    unet = world.base.denoiser
    adapters = Adapters.attach(unet)
    try:
        if case.form is dense_sum:  # it begins with LoRAs that are there
            random_adapters(case, adapters, world.rank, mergers=False)
            for layer in adapters.layers.values():
                layer.to(world.base.device)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        yield adapters
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
        adapters.detach()


def _theirs(case: Case, world: World, recipe: Recipe, steps: int, warm: int, checkpointing: bool) -> Way:
    @contextmanager
    def way() -> Iterator[Callable[[], None]]:
        with attached(case, world, checkpointing) as adapters:
            recipe.prepare(adapters, torch.Generator().manual_seed(0))
            roles = roles_of(recipe)
            loop = published(world.base, lambda: world.encode(roles), world.prompts, recipe, adapters, case.form)
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
    world: World,
    recipe: Recipe,
    steps: int,
    warm: int,
    ahead: bool = False,
    at_once: int = MAX.at_once,
) -> Way:
    @contextmanager
    def way() -> Iterator[Callable[[], None]]:
        with attached(case, world) as adapters:
            state = State.fresh(adapters, recipe, torch.Generator().manual_seed(0))
            run_data = RunData(world.base, world.encode(roles_of(recipe)), world.prompts)
            going = train(run_data, recipe, state, at_once)
            for _ in islice(going, warm):
                pass

            def go() -> None:
                taught = precomputed_targets(run_data, recipe, adapters, state.rng) if ahead else None
                for _ in islice(train(run_data, recipe, state, at_once, taught) if ahead else going, steps):
                    pass
                wait()

            yield go

    return way
