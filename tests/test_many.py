"""In double precision, many jobs at once on one base equal the same jobs alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from double import in_double

from unbraid.bases.base import Base, Picture, RunData, joined
from unbraid.bases.families import BLOCKS
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch, Factors
from unbraid.core.many import train_many
from unbraid.core.recipe import Recipe, Stop
from unbraid.core.state import State, Step
from unbraid.core.train import train
from unbraid.methods.b4m import break_
from unbraid.methods.blora import blora
from unbraid.methods.dreambooth import dreambooth
from unbraid.methods.pair import pair
from unbraid.methods.slider import slider
from unbraid.methods.unziplora import unziplora
from unbraid.methods.ziplora import ziplora

ROLES = ("image", "before", "after", "content", "style", "both", "own", "partner1", "prior")
Start = Callable[[], tuple[RunData, Recipe, State]]  # starts a job, whose adapters are attached to the model


@pytest.fixture
def unet_base(v_model: Base) -> Base:
    v_model.denoiser.double()
    return v_model


def start(base: Base, recipe: Recipe, seed: int, size: tuple[int, int] = (8, 8), loras: int = 0) -> Start:
    """Pictures, prompts, LoRAs and noise all depend on the seed."""

    def begin() -> tuple[RunData, Recipe, State]:
        rng = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=rng).double()

        std = torch.full((4, *size), 0.1).double()
        pictures = {role: [Picture(rand(4, *size), std, torch.full((6,), 32.0))] for role in ROLES}
        prompts = {role: Prompt(rand(24, 64), rand(64)) for role in ROLES}
        adapters = Adapters.attach(base.denoiser, recipe.targets)
        for name, rank in list(zip(("content", "style"), (4, 2), strict=True))[:loras]:
            made = {}
            for layer_name, layer in adapters.layers.items():
                d, k = layer.base.weight.shape
                made[layer_name] = Factors(rand(rank, k) / 8, rand(d, rank) / 8, 0.5)
            adapters.add(name, made)
        state = State.fresh(adapters, in_double(recipe), torch.Generator().manual_seed(seed))
        return RunData(base, pictures, prompts), recipe, state

    return begin


def alone(starts: Sequence[Start]) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """The losses and final state of every job, trained alone."""
    out = []
    for begin in starts:
        run_data, recipe, state = begin()
        losses = [step.loss for step in train(run_data, recipe, state)]
        state.adapters.detach()
        out.append((losses, state.tensors()))
    return out


def prepared(starts: Sequence[Start]) -> list[tuple[RunData, Recipe, State]]:
    jobs = []
    for begin in starts:
        jobs.append(begin())
        jobs[-1][2].adapters.detach()
    return jobs


def check(starts: Sequence[Start], at_once: int = 8) -> None:
    wanted, jobs = alone(starts), prepared(starts)
    losses: dict[int, list[float]] = {i: [] for i in range(len(jobs))}
    for i, step in train_many(jobs, joined, at_once):
        assert isinstance(step, Step)
        losses[i].append(step.loss)
    for i, (own, end) in enumerate(wanted):
        assert losses[i] == pytest.approx(own, abs=1e-10) and len(own) == len(losses[i]) > 0
        got = jobs[i][2].tensors()
        assert got.keys() == end.keys()
        for key, value in end.items():
            assert torch.allclose(value.double(), got[key].double(), rtol=0, atol=1e-10), (i, key)


def split(steps: int = 6, **settings: object) -> Recipe:
    given = {"rank": 4, "steps": steps, "window": 1, "content_alone": 0.5, **settings}
    (recipe,) = unziplora(BLOCKS["sdxl"], **given)  # type: ignore[arg-type]
    return recipe


@pytest.mark.slow
def test_three_splits(unet_base: Base) -> None:
    check([start(unet_base, split(4), seed) for seed in range(3)])


@pytest.mark.slow
def test_methods_step_counts_and_ranks_mixed(unet_base: Base) -> None:
    (pairs,) = pair(BLOCKS["sdxl"], rank=4, steps=3, style_from=1)
    (zipped,) = ziplora(BLOCKS["sdxl"], steps=2)
    (slid,) = slider(BLOCKS["sdxl"], rank=2, steps=2)
    (cut,) = blora(BLOCKS["sdxl"], rank=4, steps=3)
    (broken,) = break_(BLOCKS["sdxl"], rank=4, steps=2, partner_count=1)
    (learned,) = dreambooth(BLOCKS["sdxl"], rank=2, steps=2, targets="transformers", prior_weight=0.5)
    recipes = [
        split(3),
        split(5, rank=2),
        pairs,
        replace(pairs, passes=replace(pairs.passes, in_turn=True)),
        slid,
        cut,
        broken,
        learned,
    ]
    starts = [start(unet_base, recipe, seed) for seed, recipe in enumerate(recipes)]
    check([*starts, start(unet_base, zipped, 9, loras=2)])


@pytest.mark.slow
def test_more_jobs_than_are_run_at_once(unet_base: Base) -> None:
    check([start(unet_base, split(steps), steps) for steps in (2, 4, 3, 2)], at_once=2)


@pytest.mark.slow
def test_official_splits_with_masks(unet_base: Base) -> None:
    check([start(unet_base, split(4, compat="official"), seed) for seed in range(2)])


@pytest.mark.slow
def test_other_shapes_are_grouped(unet_base: Base) -> None:
    sizes = ((8, 8), (12, 4), (8, 8), (4, 12))
    check([start(unet_base, split(3), seed, size) for seed, size in enumerate(sizes)])


@pytest.mark.slow
def test_early_stopping(unet_base: Base) -> None:
    """One of two jobs stops early: with a learning rate of 0 its validation loss does not improve."""

    def recipe(lr: float) -> Recipe:
        (one,) = dreambooth(BLOCKS["sdxl"], rank=4, steps=6, lr=lr)
        return replace(one, stop=Stop((Branch("image", "both", (Active("lora"),)),), every=1, patience=1, samples=2))

    starts = [start(unet_base, recipe(lr), 0) for lr in (1e-4, 0.0)]
    counts = [len(losses) for losses, _ in alone(starts)]
    assert counts == [6, 2]
    check(starts)


@pytest.mark.slow
def test_a_failing_job_leaves_the_others_alone(unet_base: Base) -> None:
    def poison(adapters: Adapters, step: int) -> torch.Tensor | None:
        up = adapters.pieces_of("content")[0].up
        return up.sum() * float("nan") if step == 1 else None

    fine = split(4)
    poisoned = replace(fine, hooks=replace(fine.hooks, penalty=poison))
    starts = [start(unet_base, fine, 0), start(unet_base, poisoned, 1)]
    ((_, end),), jobs = alone(starts[:1]), prepared(starts)
    events = list(train_many(jobs, joined, 2))
    failed = [event for which, event in events if which == 1]
    assert len(failed) == 2 and isinstance(failed[1], UsageError) and "step 1: the loss is nan" in str(failed[1])
    got = jobs[0][2].tensors()
    assert all(torch.allclose(value.double(), got[key].double(), rtol=0, atol=1e-10) for key, value in end.items())


@pytest.mark.slow
def test_nan_in_one_row_stays_in_it(unet_base: Base) -> None:
    """Tested with a NaN penalty, and with a NaN picture in the shared passes."""
    starts = [start(unet_base, split(3), 0), start(unet_base, split(3), 1)]
    ((_, end),), jobs = alone(starts[:1]), prepared(starts)
    jobs[1][0].pictures["image"][0].mean.fill_(float("nan"))  # type: ignore[index]
    events = list(train_many(jobs, joined, 2))
    assert [type(event) for which, event in events if which == 1] == [UsageError]
    got = jobs[0][2].tensors()
    assert all(torch.allclose(value.double(), got[key].double(), rtol=0, atol=1e-10) for key, value in end.items())


@pytest.mark.slow
def test_interrupted_and_restored_in_other_company(unet_base: Base) -> None:
    starts = [start(unet_base, split(6), 0), start(unet_base, split(4), 1)]
    wanted, first = alone(starts), prepared(starts)
    steps, saved = train_many(first, joined, 2), {}
    while len(saved) < 2:
        which, step = next(steps)
        if isinstance(step, Step) and step.index == 2:
            saved[which] = first[which][2].tensors()
    steps.close()
    second = prepared(starts[::-1])
    for (_, _, state), tensors in zip(second[::-1], (saved[0], saved[1]), strict=True):
        state.restore(tensors)
    list(train_many(second, joined, 2))
    for (_, _, state), (_, end) in zip(second[::-1], wanted, strict=True):
        got = state.tensors()
        assert all(torch.allclose(value.double(), got[key].double(), rtol=0, atol=1e-10) for key, value in end.items())


@pytest.mark.slow
def test_gradient_checkpointing(unet_base: Base) -> None:
    unet_base.denoiser.enable_gradient_checkpointing()
    unet_base.denoiser.train()
    check([start(unet_base, split(2), seed) for seed in range(2)])


def test_the_model_is_left_as_it_was(unet_base: Base) -> None:
    before = {name: id(module) for name, module in unet_base.denoiser.named_modules()}
    jobs = prepared([start(unet_base, split(2), seed) for seed in range(2)])
    list(train_many(jobs, joined, 2))
    assert {name: id(module) for name, module in unet_base.denoiser.named_modules()} == before


@pytest.mark.slow
def test_one_product_for_all_jobs(unet_base: Base) -> None:
    """The number of matrix products in a layer does not depend on the number of jobs. (What adapters read from their own prompts is one
    product per job for all layers of a shape.)"""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += function.__name__.split(".")[0] in ("mm", "bmm", "addmm", "baddbmm")
            return function(*args, **(kwargs or {}))

    found = []
    for n in (2, 4):  # 4 and 8 branches
        jobs = prepared([start(unet_base, split(1), seed) for seed in range(n)])
        with Count() as count:
            list(train_many(jobs, joined, n))
        found.append(count.products)
    layers = len(jobs[0][2].adapters.layers)
    assert found[0] > 500 and 0 <= found[1] - found[0] < layers / 2, (
        "two further jobs, not even half a product per layer"
    )
