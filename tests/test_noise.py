"""How the noise of a branch is drawn, compared with its definition."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_many import start
from tiny_bases import diffusion

from unbraid.bases.base import Base, RunData, load
from unbraid.bases.families import BLOCKS
from unbraid.core.lora import Noise
from unbraid.core.recipe import Sample
from unbraid.methods.consislora import consislora
from unbraid.methods.dreambooth import dreambooth


@pytest.fixture
def eps_model(eps_base: Path) -> Base:
    return load(str(eps_base), "cpu")


def run_data(base: Base) -> RunData:
    base.denoiser.double()
    made, _, state = start(base, dreambooth(BLOCKS["sdxl"], rank=2)[0], 0)()
    state.adapters.detach()
    return made


def sample(model: RunData, noise: Noise, seed: int) -> Sample:
    (one,) = model.draw(["image"], frozenset(), torch.Generator().manual_seed(seed), [noise])
    return one


def test_an_offset_is_one_number_per_channel_on_top_of_the_same_noise(eps_model: Base) -> None:
    model, found = run_data(eps_model), []
    for seed in range(200):
        plain, offset = sample(model, Noise(), seed), sample(model, Noise(offset=0.5), seed)
        more = offset.target - plain.target  # the target of this base is the noise
        assert torch.equal(plain.t, offset.t) and torch.allclose(more, more.mean((2, 3), keepdim=True), atol=1e-6)
        sigma = (1 - diffusion(eps_model).scheduler.alphas_cumprod[plain.t]).sqrt().double()
        assert torch.allclose(offset.noisy - plain.noisy, sigma * more, atol=1e-6)
        found.append(more[0, :, 0, 0])
    assert abs(torch.cat(found).std() - 0.5) < 0.04 and torch.stack(found).std(1).min() > 1e-3


def test_branches_share_noise_that_is_drawn_in_the_same_way(eps_model: Base) -> None:
    model, shared = run_data(eps_model), frozenset(("noise", "timestep"))
    rng = torch.Generator().manual_seed(0)
    noises = [Noise(0.5), Noise(0.5), Noise()]
    one, two, three = model.draw(["image"] * 3, shared, rng, noises)  # type: ignore[arg-type]
    assert torch.equal(one.target, two.target) and not torch.equal(one.target, three.target)
    assert torch.equal(one.t, three.t)


def test_pictures_of_different_shapes_share_the_timestep_alone(eps_model: Base) -> None:
    model, rng = run_data(eps_model), torch.Generator().manual_seed(0)
    wide = replace(model.pictures["image"][0], mean=torch.zeros(4, 8, 16), std=torch.zeros(4, 8, 16))
    model.pictures = {**model.pictures, "prior": [wide]}
    one, two = model.draw(["image", "prior"], frozenset(("noise", "timestep")), rng)
    assert torch.equal(one.t, two.t) and one.target.shape != two.target.shape == (1, 4, 8, 16)


def test_consislora_has_it_while_the_style_trains() -> None:
    """The paper's 0.03; `noise_offset=0` is the usual noise."""
    (recipe,) = consislora(BLOCKS["sdxl"], steps=2, style_steps=2)
    assert [recipe.branches(step)[0].noise.offset for step in range(4)] == [0, 0, 0.03, 0.03]
    (without,) = consislora(BLOCKS["sdxl"], steps=2, style_steps=2, noise_offset=0.0)
    assert {without.branches(step)[0].noise for step in range(4)} == {Noise()}
