"""How noise is added to latents in training, what the network then has to predict, and how to invert a step of drawing."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from unbraid.common.errors import UsageError

PREDICTIONS = ("epsilon", "v_prediction")
Level = tuple[float, float]  # the factors of signal and noise in a noisy latent
Rung = tuple[float | int, Level, Level]  # a timestep of drawing, the level after its step, and the level before it


@runtime_checkable
class Process(Protocol):
    """How the noise of a base model works."""

    steps: int  # timesteps run from 0 to this number
    sampler: str  # the sampler whose steps `raised` inverts

    def to(self, device: torch.device) -> None:
        """Move what a training step reads to a device: a copy in every step would wait for it."""
        ...

    def draw_timestep(self, rng: torch.Generator, tokens: int) -> Tensor:
        """A random timestep for training, `[1]`. `tokens`: the number of 2×2 patches of the latent."""
        ...

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents, and what the network should predict for them. `latents`, `noise` and both results are
        `[b, c, h, w]`, `t` is `[b]`."""
        ...

    def factor(self, t: Tensor) -> Tensor | None:
        """By how much the loss at timesteps `t [b]` is multiplied, `[b]`. None: by 1."""
        ...

    def x0_factor(self, t: Tensor) -> Tensor:
        """The squared error of the latents without noise, as a multiple of that of the prediction they come from, `[b]`, at
        timesteps `t [b]`."""
        ...

    def to_x0(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The latents without noise, `[b, c, h, w]`, from a prediction for noisy latents at timesteps `t [b]`."""
        ...

    def time(self, timestep: Tensor) -> float:
        """A timestep as a number from 1 (pure noise) to 0."""
        ...

    def rungs(self, scheduler: Any) -> Iterator[Rung]:
        """The steps of a scheduler whose timesteps are set, from the last one, with least noise, to the first one."""
        ...

    def raised(self, latent: Tensor, found: Tensor, prediction: Tensor, rung: Rung) -> Tensor:
        """Invert a step of drawing: the latent before it. `latent`: the latent after it. `found`: an estimate of the
        result, and `prediction`: the network's prediction for `found`."""
        ...


def check_uniform(timesteps: str) -> None:
    """Raise UsageError for timesteps that are not uniform. Empty: as published, which is uniform."""
    if timesteps not in ("", "uniform"):
        what = f"this base is trained with uniform timesteps, not with {timesteps!r}"
        raise UsageError(what, "--timesteps", "Leave it out: it is for bases with flow matching, such as Flux.")


class Diffusion:
    """x_t = α_t x_0 + σ_t ε with α² + σ² = 1 (arXiv 2006.11239). The network predicts ε, or v = α_t ε − σ_t x_0 (arXiv 2202.00512)."""

    sampler: str = "ddim"

    def __init__(self, config: Any, base: str, timesteps: str = "") -> None:
        """`config`: the scheduler's configuration. `base`: the base's name, for errors. Raises UsageError for prediction
        types other than epsilon and v, and for `timesteps` other than uniform ones."""
        self.scheduler: DDPMScheduler = DDPMScheduler.from_config(config)  # type: ignore[assignment]
        self.prediction: str = self.scheduler.config["prediction_type"]
        self.steps: int = self.scheduler.config["num_train_timesteps"]
        self._signal: Tensor = self.scheduler.alphas_cumprod.clone()  # α² of every timestep
        if self.prediction not in PREDICTIONS:
            what = f"prediction type {self.prediction!r} is not supported"
            raise UsageError(what, base, "Use a base that predicts epsilon or v.")
        check_uniform(timesteps)

    def to(self, device: torch.device) -> None:
        self._signal = self._signal.to(device)

    def draw_timestep(self, rng: torch.Generator, tokens: int) -> Tensor:
        """A uniformly distributed timestep, `[1]`."""
        del tokens
        return torch.randint(self.steps, (1,), generator=rng)

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noisy = self.scheduler.add_noise(latents, noise, t)  # type: ignore[arg-type]
        is_v = self.prediction == "v_prediction"
        return noisy, self.scheduler.get_velocity(latents, noise, t) if is_v else noise  # type: ignore[arg-type]

    def x0_factor(self, t: Tensor) -> Tensor:
        """The squared error of x̂_0 as a multiple of that of the prediction it comes from, `[b]`, at timesteps `t [b]`.

        x̂_0 is (x_t − σ ε) / α or α x_t − σ v, so the factor is σ² / α², which is 1 / SNR, or σ²."""
        signal = self._signal[t]
        return 1 - signal if self.prediction == "v_prediction" else (1 - signal) / signal

    def factor(self, t: Tensor) -> Tensor | None:
        return None

    def to_x0(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """With zero terminal SNR, it is infinite at the last timestep of a base that predicts ε."""
        signal = self.scheduler.alphas_cumprod.to(noisy)[t].view(-1, 1, 1, 1)
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        if self.prediction == "v_prediction":
            return alpha * noisy - sigma * prediction
        return (noisy - sigma * prediction) / alpha

    def velocity(self, prediction: Tensor, noisy: Tensor, alpha: float, sigma: float) -> Tensor:
        """The network's prediction converted to v. `alpha`, `sigma`: the factors of signal and noise at this timestep."""
        return prediction if self.prediction == "v_prediction" else (prediction - sigma * noisy) / alpha

    def time(self, timestep: Tensor) -> float:
        return float(timestep) / self.steps

    def rungs(self, scheduler: Any) -> Iterator[Rung]:
        stride = scheduler.config["num_train_timesteps"] // len(scheduler.timesteps)
        for t in reversed(scheduler.timesteps.tolist()):
            below = scheduler.alphas_cumprod[t - stride] if t >= stride else scheduler.final_alpha_cumprod
            yield t, _level(below), _level(scheduler.alphas_cumprod[t])

    def raised(self, latent: Tensor, found: Tensor, prediction: Tensor, rung: Rung) -> Tensor:
        """A DDIM step is z_s = (α_s α_t + σ_s σ_t) z_t + (σ_s α_t − α_s σ_t) v(z_t); this solves it for the z_t outside v."""
        _, (a_s, o_s), (a_t, o_t) = rung
        velocity = self.velocity(prediction, found, a_t, o_t)
        return (latent - (o_s * a_t - a_s * o_t) * velocity) / (a_s * a_t + o_s * o_t)


def _level(signal: Tensor) -> Level:
    return float(signal) ** 0.5, (1 - float(signal)) ** 0.5
