"""Flow matching: the noise of Flux, SD3.5 and Z-Image."""

import re
from collections.abc import Iterator
from math import exp, isfinite
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from unbraid.bases.families.noising import Rung
from unbraid.common.errors import UsageError

DENSITIES = ("uniform", "logit-normal")
FIX = "Give uniform or logit-normal, alone or with +shift=3.16 or +dynamic."


class Flow:
    """x_t = (1 − σ) x_0 + σ ε (arXiv 2210.02747). The network predicts the velocity v = ε − x_0. A timestep is 1000 σ.

    In training, a place on the base's grid of timesteps is drawn, uniformly or with a logit-normal density (arXiv
    2403.03206). The grid is that of diffusers' training scripts: a fixed shift of the scheduler is in it, a dynamic one is
    not. With `+shift=S` or `+dynamic`, it is shifted from the plain grid instead: σ' = S σ / (1 + (S − 1) σ)."""

    sampler: str = "euler"

    def __init__(self, config: Any, base: str, timesteps: str = "uniform", preconditioned: bool = False) -> None:
        """`config`: the scheduler's configuration. `base`: the base's name, for errors. `timesteps`: a density and, if
        wanted, a shift. `preconditioned`: whether the loss is that of x_0 = x_t − σ v in place of v. Raises UsageError
        for another kind of noise, and for unknown `timesteps`."""
        if "shift" not in config or config.get("invert_sigmas"):
            raise UsageError("its scheduler is none of flow matching", base, "Give FlowMatchEulerDiscreteScheduler.")
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
        self.steps: int = self.scheduler.config["num_train_timesteps"]
        self.grid: Tensor = self.scheduler.timesteps.clone()
        self.density, self.shift = parsed(timesteps)
        self.preconditioned = preconditioned

    def to(self, device: torch.device) -> None:
        """A training step reads no table."""

    def draw_timestep(self, rng: torch.Generator, tokens: int) -> Tensor:
        place = torch.rand(1, generator=rng)
        if self.density == "logit-normal":
            place = torch.sigmoid(torch.randn(1, generator=rng))
        index = (place * self.steps).long().clamp(max=self.steps - 1)
        if not self.shift:
            return self.grid[index]
        shift = exp(dynamic_shift(self.scheduler.config, tokens)) if self.shift == "dynamic" else float(self.shift)
        sigma = (self.steps - index) / self.steps
        return shift * sigma / (1 + (shift - 1) * sigma) * self.steps

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._sigma(t, latents)
        return (1.0 - sigma) * latents + sigma * noise, noise - latents

    def factor(self, t: Tensor) -> Tensor | None:
        """σ² if the loss is that of x_0: the difference of two x_0 is σ times the difference of their velocities."""
        return self.x0_factor(t) if self.preconditioned else None

    def x0_factor(self, t: Tensor) -> Tensor:
        return (t / self.steps) ** 2

    def to_x0(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        return noisy - self._sigma(t, noisy) * prediction

    def time(self, timestep: Tensor) -> float:
        return min(1.0, float(timestep) / self.steps)

    def rungs(self, scheduler: Any) -> Iterator[Rung]:
        sigmas = scheduler.sigmas.tolist()
        for i in reversed(range(len(scheduler.timesteps))):
            below, here = sigmas[i + 1], sigmas[i]
            yield float(scheduler.timesteps[i]), (1 - below, below), (1 - here, here)

    def raised(self, latent: Tensor, found: Tensor, prediction: Tensor, rung: Rung) -> Tensor:
        """A step of Euler's method is z_s = z_t + (σ_s − σ_t) v(z_t); this solves it for the z_t outside v."""
        del found
        _, (_, below), (_, here) = rung
        return latent + (here - below) * prediction

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        return (t / self.steps).to(like).view(-1, 1, 1, 1)


def parsed(timesteps: str) -> tuple[str, str]:
    """`uniform+shift=3` as (`uniform`, `3`), `logit-normal+dynamic` as (`logit-normal`, `dynamic`), `uniform` as (`uniform`,
    ``). Raises UsageError for anything else."""
    density, plus, shift = timesteps.partition("+")
    number = re.fullmatch(r"shift=(\d{1,6}(?:\.\d{1,9})?)", shift)
    wrong = density not in DENSITIES or (plus and shift != "dynamic" and not number)
    if wrong or (number and not (isfinite(float(number[1])) and float(number[1]) > 0)):
        raise UsageError(f"{timesteps!r} is no way to draw timesteps", "--timesteps", FIX)
    return density, number[1] if number else shift


def dynamic_shift(config: Any, tokens: int) -> float:
    """μ of a scheduler with dynamic shifting: a straight line in the number of tokens of a picture. The shift is e^μ."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (last - first) / (high - low)
    return tokens * slope + first - slope * low
