"""No step waits for the device, for every method. Waits are counted on a second device that is not the CPU."""

from pathlib import Path

import pytest
import torch
from second_device import host_copies, second
from test_graphs import METHODS, STEPS
from test_many import ROLES

from unbraid.bases.base import Picture, RunData, load
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Factors
from unbraid.core.state import CHECK_EVERY, State, Step
from unbraid.core.train import train

pytestmark = pytest.mark.slow

__all__ = ["second"]  # a fixture


@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_wait(name: str, second: str, v_base: Path) -> None:
    """After the first step, no value is copied to the host, also when channels are granted or the style adapter begins to train. Only random
    numbers are copied to the device: for each branch, the latent's noise, the timestep and the noise."""
    recipe, loras, _ = METHODS[name]
    base, rng = load(str(v_base), second), torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(second)

    pictures = {role: [Picture(rand(4, 8, 8), rand(4, 8, 8).abs() / 9, rand(6))] for role in ROLES}
    prompts = {role: Prompt(rand(24, 64), rand(64)) for role in ROLES}
    adapters = Adapters.attach(base.denoiser, recipe.targets)
    for lora in ("content", "style")[:loras]:
        sizes = {layer: one.base.weight.shape for layer, one in adapters.layers.items()}
        adapters.add(lora, {layer: Factors(rand(4, k) / 8, rand(d, 4) / 8) for layer, (d, k) in sizes.items()})
    state = State.fresh(adapters, recipe, torch.Generator().manual_seed(0))
    going, waits = train(RunData(base, pictures, prompts), recipe, state), []
    next(going)
    for i in range(1, min(recipe.steps, STEPS + 3) - 1):  # the last step checks the figures of all
        with host_copies() as found:
            next(going)
        waits.append((i, found.to_host, found.from_host <= 3 * len(recipe.branches(i))))
    adapters.detach()
    assert waits and all(to_host == 0 and draws_alone for _, to_host, draws_alone in waits), waits


def test_figures_are_looked_at_once_in_a_while(second: str, v_base: Path) -> None:
    """A loss that is not finite ends the run; the error names the step, and no state is saved in between."""
    adapters = Adapters.attach(load(str(v_base), second).denoiser)
    state = State(adapters, torch.optim.AdamW([torch.zeros(1)]), torch.Generator())
    for i in range(CHECK_EVERY - 1):
        state.record(Step(i, torch.tensor([1.0, 1.0 if i != 5 else float("nan"), 1.0], device=second)))
    with pytest.raises(UsageError, match="step 5"):
        state.tensors()
    for i in range(CHECK_EVERY - 1):
        state.record(Step(i, torch.ones(3, device=second)))
    with pytest.raises(UsageError, match=f"step {CHECK_EVERY - 1}: the loss is inf"):
        state.record(Step(CHECK_EVERY - 1, torch.tensor([float("inf"), 1.0, 1.0], device=second)))
    adapters.detach()
