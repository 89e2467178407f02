"""Inversion, to edit a real picture: find the noise from which sampling draws that picture.

This is DDIM inversion (arXiv 2010.02502), or the same for flow matching, where a step is one of Euler's method; with a
fixed-point iteration per step as in ReNoise (arXiv 2403.14602)."""

import torch
from PIL import Image
from torch import Tensor

from unbraid.bases.base import Base
from unbraid.bases.families.family import Prompt
from unbraid.images.crop import Pixels
from unbraid.sampling.sample import Guided, Term
from unbraid.sampling.samplers import with_sampler

ITERATIONS = 3  # evaluations of the model per step; each one shrinks the error by a factor that depends on the step


@torch.no_grad()
def invert(base: Base, pixels: Pixels, prompt: Prompt, steps: int = 50) -> Tensor:
    """The starting noise of a picture, a latent `[1, c, h, w]`.

    Drawing from this latent with the same sampler, `steps` and `prompt`, without guidance, gives the picture back.

    A step of drawing computes z_s from z_t and the prediction for z_t. Inversion knows z_s and solves for z_t: each
    iteration evaluates the network at the last estimate of z_t. No noise is added, and none is regularised."""
    picture = base.encode_picture(pixels.values, pixels.sizes)
    latent = picture.mean[None]
    scheduler = with_sampler(base, base.process.sampler).pipe.scheduler
    base.family.network.schedule(scheduler, steps, (latent.shape[2], latent.shape[3]))
    guided = Guided(base, (Term(1.0, "source"),), {"source": prompt}, None)
    height, width = pixels.values.shape[1:]
    sizes = torch.tensor(
        [[height, width, 0, 0, height, width]], device=base.device
    )  # the values that the pipelines pass when they draw
    for rung in base.process.rungs(scheduler):
        found, t = latent, torch.tensor(rung[0])
        for _ in range(ITERATIONS):
            found = base.process.raised(
                latent, found, guided.at(found, t, {"added_cond_kwargs": {"time_ids": sizes}}), rung
            )
        latent = found
    return latent


def reconstruct(base: Base, pixels: Pixels) -> Image.Image:
    """Encode and decode a picture with the autoencoder alone. No editing can give the picture back better than this."""
    with torch.no_grad():
        mean = base.encode_picture(pixels.values, pixels.sizes).mean[None]
        scale, shift = base.vae.config["scaling_factor"], base.vae.config.get("shift_factor") or 0.0
        decoded = base.vae.decode(mean / scale + shift).sample  # type: ignore[union-attr]
    return base.pipe.image_processor.postprocess(decoded)[0]  # type: ignore[return-value]
