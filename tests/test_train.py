"""The trainer on a tiny SDXL-type UNet, mostly in double precision."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from double import in_double

from unbraid.bases.base import Base, Picture, RunData
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch
from unbraid.core.optim import Rate
from unbraid.core.recipe import Hooks, Recipe
from unbraid.core.state import State
from unbraid.core.train import train

BRANCHES = (
    Branch("one", "p", (Active("a", prompt="q"), Active("b", 0.5))),
    Branch("two", "q", (Active("a", trains=frozenset(("up",))),), weight=0.3),
    Branch("one", "q", (Active("b"),), teacher=Branch("one", "p", (Active("a"),)), weight=2.0),
)
RATES = {(name, part): Rate(1e-3) for name in "ab" for part in ("down", "up")}


def prepare(adapters: Adapters, rng: torch.Generator) -> None:
    for name in "ab":
        adapters.new(name, 4, rng, up_std=0.1)


def recipe(branches: tuple[Branch, ...] = BRANCHES, steps: int = 3) -> Recipe:
    return Recipe(prepare, lambda step: branches, RATES, steps)  # type: ignore[arg-type]


@pytest.fixture
def run_data(v_model: Base) -> Iterator[RunData]:
    rng = torch.Generator().manual_seed(1)
    v_model.denoiser.double()

    def picture() -> Picture:
        return Picture(
            torch.randn(4, 8, 8, generator=rng).double(), torch.full((4, 8, 8), 0.1).double(), torch.full((6,), 32.0)
        )

    def prompt() -> Prompt:
        return Prompt(torch.randn(24, 64, generator=rng).double(), torch.randn(64, generator=rng).double())

    yield RunData(v_model, {"one": [picture()], "two": [picture()]}, {"p": prompt(), "q": prompt()})


def ready(run_data: RunData, one: Recipe, seed: int = 0) -> State:
    state = State.fresh(Adapters.attach(run_data.base.denoiser), in_double(one), torch.Generator().manual_seed(seed))
    return state


def gradients(run_data: RunData, at_once: int) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients of one step, taken before the optimiser step."""
    caught: dict[str, torch.Tensor] = {}

    def catch(adapters: Adapters, step: int) -> None:
        for i, some in enumerate(adapters.pieces()):
            for name, factors in some.items():
                caught.update(
                    {f"{i}/{name}/{part}": p.grad.clone() for part, p in factors.parts() if p.grad is not None}
                )

    one = Recipe(prepare, lambda step: BRANCHES, RATES, 1, hooks=Hooks(after_backward=catch))  # type: ignore[arg-type]
    state = ready(run_data, one)
    (step,) = train(run_data, one, state, at_once)
    state.adapters.detach()
    return caught, step.loss


def test_branches_batched_equal_one_by_one(run_data: RunData) -> None:
    alone, loss = gradients(run_data, 1)
    together, loss_together = gradients(run_data, 3)
    assert loss == pytest.approx(loss_together, abs=1e-14)
    assert alone.keys() == together.keys() and sum(map(len, alone.values())) > 100  # in as many layers
    assert max((alone[key] - together[key]).abs().max().item() for key in alone) < 1e-14


def test_gradient_checkpointing_changes_nothing(run_data: RunData) -> None:
    plain, loss = gradients(run_data, 2)
    run_data.base.denoiser.enable_gradient_checkpointing()
    run_data.base.denoiser.train()
    checkpointed, loss_checkpointed = gradients(run_data, 2)
    assert loss == pytest.approx(loss_checkpointed, abs=1e-14)
    assert max((plain[key] - checkpointed[key]).abs().max().item() for key in plain) < 1e-13


def test_the_loss_is_the_formula(run_data: RunData) -> None:
    """Σ weight · mean (v̂ - v)², with the teacher's prediction in place of v where there is a teacher."""
    one = recipe(steps=1)
    state = ready(run_data, one)
    rng = torch.Generator()
    rng.set_state(state.rng.get_state())
    samples = run_data.draw([branch.image for branch in BRANCHES], frozenset(), rng)
    expected = 0.0
    with torch.no_grad():
        for sample, branch in zip(samples, BRANCHES, strict=True):
            target = sample.target
            if branch.teacher:
                with state.adapters.activate([branch.teacher.active], run_data.prompts):
                    target = run_data.predict([sample], [branch.teacher.prompt])
            with state.adapters.activate([branch.active], run_data.prompts):
                expected += branch.weight * F.mse_loss(run_data.predict([sample], [branch.prompt]), target).item()
    (step,) = train(run_data, one, state)
    assert step.loss == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_interrupted_and_restored_equals_uninterrupted(run_data: RunData) -> None:
    one = recipe(steps=6)
    whole = ready(run_data, one)
    losses = [step.loss for step in train(run_data, one, whole)]
    end = whole.tensors()
    whole.adapters.detach()
    first = ready(run_data, one)
    steps = train(run_data, one, first)
    for _ in range(3):
        next(steps)
    saved = first.tensors()
    first.adapters.detach()
    second = ready(run_data, one, seed=99)
    second.restore(saved)
    assert [step.loss for step in train(run_data, one, second)] == losses[3:]
    again = second.tensors()
    assert end.keys() == again.keys() and all(torch.equal(end[key], again[key]) for key in end)


def test_a_state_of_another_recipe_is_refused(run_data: RunData) -> None:
    state = ready(run_data, recipe())
    saved = state.tensors()
    state.adapters.detach()
    other = Recipe(lambda adapters, rng: adapters.new("a", 2, rng), lambda step: (), RATES, 1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="does not fit these settings"):
        ready(run_data, other).restore(saved)


def test_a_part_without_a_rate_stays_bit_identical(run_data: RunData) -> None:
    one = Recipe(prepare, lambda step: BRANCHES, {("a", "up"): Rate(1e-2, 0.1)}, 3)
    state = ready(run_data, one)
    before = {key: value.clone() for key, value in state.tensors().items() if key.startswith("adapter/")}
    list(train(run_data, one, state))
    after = state.tensors()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed and all("/a.up" in key or ".a.up" in key for key in changed)


def test_shared_noise_and_timestep(run_data: RunData) -> None:
    rng = torch.Generator().manual_seed(0)
    one, two = run_data.draw(["one", "one"], frozenset(("noise", "timestep")), rng)
    assert one.t == two.t
    three, four = run_data.draw(["one", "one"], frozenset(), rng)
    assert not torch.equal(three.noisy, four.noisy)


def test_nan_is_told_with_its_step(run_data: RunData) -> None:
    def poison(adapters: Adapters, step: int) -> torch.Tensor | None:
        up = adapters.pieces_of("a")[0].up
        return up.sum() * float("nan") if step == 1 else None

    one = Recipe(prepare, lambda step: BRANCHES, RATES, 3, hooks=Hooks(penalty=poison))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"step 1: the loss is nan"):
        list(train(run_data, one, ready(run_data, one)))


def test_nothing_to_train_is_refused(run_data: RunData) -> None:
    with pytest.raises(UsageError, match="nothing would be trained"):
        ready(run_data, Recipe(prepare, lambda step: BRANCHES, {}, 1))
