"""Flow matching against diffusers' own scheduler and training functions, in fp64."""

from math import exp
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from unbraid.bases.families.flow import Flow, dynamic_shift, parsed
from unbraid.bases.families.noising import Diffusion, Process
from unbraid.common.errors import UsageError

CONFIGS = (
    {"shift": 3.0},  # SD3.5, Z-Image-Turbo
    {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},  # Flux.1-dev
)


def drawn(process: Process, count: int, tokens: int = 1024) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.cat([process.draw_timestep(rng, tokens) for _ in range(count)])


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("config", CONFIGS)
def test_corrupt_is_the_schedulers_scale_noise(config: dict[str, Any]) -> None:
    theirs: Any = FlowMatchEulerDiscreteScheduler(**config)
    flow, clean, noise = Flow(theirs.config, "base"), latents(), latents(1)
    assert isinstance(flow, Process) and torch.equal(flow.grid, theirs.timesteps)
    for i in (0, 500, 999):
        t = theirs.timesteps[i].expand(2)
        noisy, target = flow.corrupt(clean, noise, t)
        torch.testing.assert_close(noisy, theirs.scale_noise(clean, t, noise), atol=1e-7, rtol=0)
        assert torch.equal(target, noise - clean)
        torch.testing.assert_close(flow.to_x0(target, noisy, t), clean, atol=1e-12, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_to_no_noise_is_to_x0_and_raised_inverts_every_step(config: dict[str, Any]) -> None:
    theirs: Any = FlowMatchEulerDiscreteScheduler(**config)
    flow, latent, velocity = Flow(theirs.config, "base"), latents(), latents(1)
    theirs.set_timesteps(4, mu=0.7)
    rungs = list(flow.rungs(theirs))[::-1]
    for t, rung in zip(theirs.timesteps, rungs, strict=True):
        after = theirs.step(velocity, t, latent)[0].double()
        torch.testing.assert_close(flow.raised(after, latent, velocity, rung), latent, atol=1e-6, rtol=0)
        assert rung[0] == float(t) and flow.time(t) == pytest.approx(rung[2][1])
        if rung[1][1] == 0:
            torch.testing.assert_close(after, flow.to_x0(velocity, latent, t.expand(2)), atol=1e-6, rtol=0)
        latent = after


def test_timesteps_are_drawn_as_in_diffusers_scripts() -> None:
    """Their scripts take scheduler.timesteps[(u · 1000)], with u from `compute_density_for_timestep_sampling`."""
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for ours, density in (("uniform", "none"), ("logit-normal", "logit_normal")):
        rng = torch.Generator().manual_seed(0)
        u = [
            compute_density_for_timestep_sampling(density, 1, logit_mean=0.0, logit_std=1.0, generator=rng)
            if density == "none"
            else torch.sigmoid(torch.randn(1, generator=rng))
            for _ in range(50)
        ]
        expected = theirs.timesteps[(torch.cat(u) * 1000).long()]
        if ours == "uniform":
            assert torch.equal(drawn(Flow(theirs.config, "base", ours), 50), expected)
        else:  # torch.randn in place of torch.normal(mean=0, std=1): the same density
            found = drawn(Flow(theirs.config, "base", ours), 2000) / 1000
            plain = found / (3 - 2 * found)  # the shift undone
            odds = torch.logit(plain)
            assert abs(float(odds.mean())) < 0.1 and abs(float(odds.std()) - 1) < 0.1


def test_shifts() -> None:
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    plain = drawn(Flow(theirs.config, "base"), 100) / 1000  # a dynamic shift is not in the grid
    for tokens in (256, 1024, 4096):
        mu = calculate_shift(tokens)
        assert dynamic_shift(theirs.config, tokens) == pytest.approx(mu)
        found = drawn(Flow(theirs.config, "base", "uniform+dynamic"), 100, tokens) / 1000
        torch.testing.assert_close(found, theirs.time_shift(mu, 1.0, plain), atol=1e-6, rtol=0)
        fixed = drawn(Flow(theirs.config, "base", f"uniform+shift={exp(mu):.6f}"), 100, tokens) / 1000
        torch.testing.assert_close(fixed, found, atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", ("", "normal", "uniform+", "uniform+shift=0", "uniform+shift=-1", "uniform+shift=x"))
def test_other_timesteps_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no way to draw timesteps"):
        parsed(text)


def test_the_loss_of_x0_is_sigma_squared_times_the_loss_of_the_velocity() -> None:
    flow = Flow(FlowMatchEulerDiscreteScheduler(shift=3.0).config, "base", preconditioned=True)
    clean, noise, guess, t = latents(), latents(1), latents(2), torch.tensor([800.0, 100.0])
    noisy, target = flow.corrupt(clean, noise, t)
    factor = flow.factor(t)
    assert factor is not None
    one = (flow.to_x0(guess, noisy, t) - clean).square().flatten(1).mean(1)
    other = factor * (guess - target).square().flatten(1).mean(1)
    torch.testing.assert_close(one, other.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction"))
def test_diffusion_has_the_same_interface(prediction: str) -> None:
    from diffusers import DDIMScheduler

    given: dict[str, Any] = {"prediction_type": prediction, "clip_sample": False, "set_alpha_to_one": False}
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", **given)
    process, clean, noise, t = Diffusion(scheduler.config, "base"), latents(), latents(1), torch.tensor([700, 3])
    assert isinstance(process, Process) and process.factor(t) is None
    noisy, target = process.corrupt(clean, noise, t)
    torch.testing.assert_close(process.to_x0(target, noisy, t), clean, atol=1e-6, rtol=0)
    scheduler.set_timesteps(5)
    latent = clean
    for t, rung in zip(scheduler.timesteps, list(process.rungs(scheduler))[::-1], strict=True):
        after = scheduler.step(noise, t, latent)[0]
        torch.testing.assert_close(process.raised(after, latent, noise, rung), latent, atol=1e-5, rtol=0)
        latent = after
    with pytest.raises(UsageError, match="uniform timesteps"):
        Diffusion(scheduler.config, "base", "logit-normal")
