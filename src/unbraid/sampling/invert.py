"""Inversion, to edit a real picture: find the noise from which sampling draws that picture.

This is DDIM inversion (arXiv 2010.02502), with a fixed-point iteration per step as in ReNoise (arXiv 2403.14602)."""

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from unbraid.bases.base import Base
from unbraid.bases.families.family import Prompt
from unbraid.images.crop import Pixels
from unbraid.sampling.sample import Guided, Term

ITERATIONS = 3  # evaluations of the model per step; each one shrinks the error by a factor that depends on the step


@torch.no_grad()
def invert(base: Base, pixels: Pixels, prompt: Prompt, steps: int = 50) -> Tensor:
    """The starting noise of a picture, a latent `[1, c, h, w]`.

    DDIM from this latent with the same `steps` and `prompt`, without guidance, gives the picture back.

    A DDIM step from t to s is z_s = (α_s α_t + σ_s σ_t) z_t + (σ_s α_t − α_s σ_t) v(z_t), with the velocity v and
    α² + σ² = 1. Inversion knows z_s and solves for z_t: each iteration evaluates v at the last estimate of z_t. No
    noise is added, and none is regularised."""
    picture = base.encode_picture(pixels.values, pixels.sizes)
    scheduler: DDIMScheduler = DDIMScheduler.from_config(base.pipe.scheduler.config)  # type: ignore[assignment]
    scheduler.set_timesteps(steps)
    guided = Guided(base, (Term(1.0, "source"),), {"source": prompt}, None)
    stride = scheduler.config["num_train_timesteps"] // steps
    latent = picture.mean[None]
    height, width = pixels.values.shape[1:]
    sizes = torch.tensor(
        [[height, width, 0, 0, height, width]], device=base.device
    )  # the values that the pipelines pass when they draw
    for t in reversed(scheduler.timesteps.tolist()):
        below = scheduler.alphas_cumprod[t - stride] if t >= stride else scheduler.final_alpha_cumprod
        (a_s, o_s), (a_t, o_t) = _signal_noise(below), _signal_noise(scheduler.alphas_cumprod[t])
        found = latent
        for _ in range(ITERATIONS):
            out = guided(found, torch.tensor(t), added_cond_kwargs={"time_ids": sizes})[0]
            velocity = base.process.velocity(out, found, a_t, o_t)
            found = (latent - (o_s * a_t - a_s * o_t) * velocity) / (a_s * a_t + o_s * o_t)
        latent = found
    return latent


def reconstruct(base: Base, pixels: Pixels) -> Image.Image:
    """Encode and decode a picture with the autoencoder alone. No editing can give the picture back better than this."""
    with torch.no_grad():
        mean = base.encode_picture(pixels.values, pixels.sizes).mean[None]
        scale, shift = base.vae.config["scaling_factor"], base.vae.config.get("shift_factor") or 0.0
        decoded = base.vae.decode(mean / scale + shift).sample  # type: ignore[union-attr]
    return base.pipe.image_processor.postprocess(decoded)[0]  # type: ignore[return-value]


def _signal_noise(alpha: Tensor) -> tuple[float, float]:
    return float(alpha) ** 0.5, (1 - float(alpha)) ** 0.5
