"""The x0 loss, in double precision, compared with its definition: the squared error of the clean latent."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import DDPMScheduler
from test_graphs import case
from test_many import start
from tiny_bases import diffusion
from torch import Tensor

from unbraid.bases.base import Base, load
from unbraid.bases.families import BLOCKS
from unbraid.bases.families.noising import Diffusion
from unbraid.core.recipe import Sample
from unbraid.core.train import train
from unbraid.methods import ENTRIES
from unbraid.runs.settings import resolve, schema


def clean(base: Base, sample: Sample, prediction: Tensor) -> Tensor:
    """x̂_0 from a prediction, by the definitions of epsilon and v."""
    signal = diffusion(base).scheduler.alphas_cumprod[sample.t].double()
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    if diffusion(base).prediction == "v_prediction":
        return alpha * sample.noisy - sigma * prediction
    return (sample.noisy - sigma * prediction) / alpha


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_factor_is_its_formula(prediction: Literal["epsilon", "v_prediction"]) -> None:
    process = Diffusion(DDPMScheduler(prediction_type=prediction).config, "test")
    rng = torch.Generator().manual_seed(0)
    latent, noise, guess = (torch.randn(5, 4, 8, 8, generator=rng).double() for _ in range(3))
    t = torch.tensor([0, 10, 400, 900, 999])
    noisy, target = process.corrupt(latent, noise, t)
    signal = process.scheduler.alphas_cumprod[t].double()
    alpha, sigma = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
    is_v = prediction == "v_prediction"
    found = alpha * noisy - sigma * guess if is_v else (noisy - sigma * guess) / alpha
    wanted = (latent - found).square().flatten(1).mean(1)
    mine = (target - guess).square().flatten(1).mean(1) * process.x0_factor(t)
    assert torch.allclose(mine, wanted, rtol=1e-4)  # the scheduler's own α and σ are in single precision
    assert is_v or torch.allclose(process.x0_factor(t), (1 - signal.float()) / signal.float())


@pytest.mark.parametrize("base", ["v_base", "eps_base"])
def test_training_minimises_it(base: str, request: pytest.FixtureRequest) -> None:
    """From step 1 on, the loss and its gradient are those of ‖x_0 − x̂_0‖²; before, those of the prediction."""
    path: Path = request.getfixturevalue(base)
    model = load(str(path), "cpu")
    model.denoiser.double()
    recipe, _, _ = case("dreambooth", loss="x0", x0_from=1)
    run_data, recipe, state = start(model, recipe, 0)()
    going = train(run_data, recipe, state)
    for step in range(3):
        rng = state.rng.clone_state()
        (sample,) = run_data.draw(["image"], frozenset(), rng)
        (branch,) = recipe.branches(step)
        with state.adapters.activate([branch.active], run_data.prompts):
            guess = run_data.predict([sample], ["both"])
            if step == 0:
                wanted = (guess - sample.target).square().mean()
            else:
                wanted = (clean(model, sample, sample.target) - clean(model, sample, guess)).square().mean()
            trained = state.adapters.training()
            gradients = torch.autograd.grad(wanted, trained, allow_unused=True)
        norm = torch.stack([one.square().sum() for one in gradients if one is not None]).sum().sqrt()
        done = next(going)
        assert done.losses[0] == pytest.approx(wanted.item(), rel=1e-5)
        assert done.norm == pytest.approx(norm.item(), rel=1e-5)
    state.adapters.detach()


def test_every_method_of_pictures_has_it() -> None:
    """All but those that learn from other LoRAs, and ConsisLoRA, which always uses it. The default is the usual loss."""
    having = {entry.name for entry in ENTRIES if "loss" in schema(entry)}
    assert having == {entry.name for entry in ENTRIES if entry.verb != "zip"} - {"consislora"}
    for name in having:
        (entry,) = (one for one in ENTRIES if one.name == name)
        settings = resolve(name, "icons", None, {})
        (plain,) = entry.make(BLOCKS["sdxl"], **settings)
        (changed,) = entry.make(BLOCKS["sdxl"], **{**settings, "loss": "x0", "x0_from": 5})
        assert {one.loss for step in range(plain.steps) for one in plain.branches(step)} == {"prediction"}
        assert {one.loss for step in range(5) for one in changed.branches(step)} == {"prediction"}
        assert {one.loss for step in range(5, changed.steps) for one in changed.branches(step)} == {"x0"}
