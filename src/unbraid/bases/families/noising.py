"""How noise is added to latents in training, and what the network then has to predict."""

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from unbraid.common.errors import UsageError

PREDICTIONS = ("epsilon", "v_prediction")


class Diffusion:
    """x_t = α_t x_0 + σ_t ε with α² + σ² = 1 (arXiv 2006.11239). The network predicts ε, or v = α_t ε − σ_t x_0 (arXiv 2202.00512)."""

    def __init__(self, config: Any, base: str) -> None:
        """`config`: the scheduler's configuration. `base`: the base's name, for errors. Raises UsageError for prediction
        types other than epsilon and v."""
        self.scheduler: DDPMScheduler = DDPMScheduler.from_config(config)  # type: ignore[assignment]
        self.prediction: str = self.scheduler.config["prediction_type"]
        self.steps: int = self.scheduler.config["num_train_timesteps"]
        self._signal: Tensor = self.scheduler.alphas_cumprod.clone()  # α² of every timestep
        if self.prediction not in PREDICTIONS:
            what = f"prediction type {self.prediction!r} is not supported"
            raise UsageError(what, base, "Use a base that predicts epsilon or v.")

    def draw_timestep(self, rng: torch.Generator) -> Tensor:
        """A uniformly distributed timestep, `[1]`."""
        return torch.randint(self.steps, (1,), generator=rng)

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents, and what the network should predict for them. `latents`, `noise` and both results are
        `[b, c, h, w]`, `t` is `[b]`."""
        noisy = self.scheduler.add_noise(latents, noise, t)  # type: ignore[arg-type]
        is_v = self.prediction == "v_prediction"
        return noisy, self.scheduler.get_velocity(latents, noise, t) if is_v else noise  # type: ignore[arg-type]

    def x0_factor(self, t: Tensor) -> Tensor:
        """The squared error of x̂_0 as a multiple of that of the prediction it comes from, `[b]`, at timesteps `t [b]`.

        x̂_0 is (x_t − σ ε) / α or α x_t − σ v, so the factor is σ² / α², which is 1 / SNR, or σ²."""
        if self._signal.device != t.device:  # kept on the device: a copy in every step would wait for it
            self._signal = self._signal.to(t.device)
        signal = self._signal[t]
        return 1 - signal if self.prediction == "v_prediction" else (1 - signal) / signal

    def velocity(self, prediction: Tensor, noisy: Tensor, alpha: float, sigma: float) -> Tensor:
        """The network's prediction converted to v. `alpha`, `sigma`: the factors of signal and noise at this timestep."""
        return prediction if self.prediction == "v_prediction" else (prediction - sigma * noisy) / alpha

    def time(self, timestep: Tensor) -> float:
        """A timestep as a number from 1 (pure noise) to 0."""
        return float(timestep) / self.steps
