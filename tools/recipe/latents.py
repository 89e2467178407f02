"""The cache between VAE and UNet: every trained picture under every filter, encoded once."""

from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbraid.bench.truth.filters import TRAIN_FILTERS


@torch.no_grad()
def encode(model: AutoencoderKL, art: np.ndarray, work: Path) -> tuple[Tensor, float]:
    """Scaled latents `[subject, style, 1 + filters, c, h, w]` of uint8 `art [subject, style, h, w, 3]`, and the scale.

    One scalar brings them to unit variance; whitening channel by channel was tried and is worse (docs/LOG.md)."""
    saved = work / f"latents.{len(art)}.safetensors"
    if not saved.exists():
        rows = []
        for subject in track(art, "encoding", transient=True):
            x = torch.from_numpy(np.array(subject)).permute(0, 3, 1, 2).float() / 255
            looks = torch.stack([x, *(f(x).expand_as(x) for f in TRAIN_FILTERS.values())], 1)
            device = next(model.parameters()).device
            mean = model.encode(looks.flatten(0, 1).to(device) * 2 - 1).latent_dist.mode().cpu()  # type: ignore[union-attr]
            rows.append(mean.unflatten(0, looks.shape[:2]))
        latents = torch.stack(rows)
        scale = (1 / latents.std()).reshape(1)
        part = saved.with_suffix(".part")
        save_file({"latents": latents * scale, "scale": scale}, part)
        part.rename(saved)
    file = load_file(saved)
    return file["latents"], file["scale"].item()
