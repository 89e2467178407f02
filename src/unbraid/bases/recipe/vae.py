"""Stage 3: the autoencoder. Trained on crops of real icons under random filters."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from unbraid.bases.recipe import checkpoint
from unbraid.bases.recipe.config import Config
from unbraid.bases.recipe.filters import TRAIN_FILTERS


def build(config: Config) -> AutoencoderKL:
    levels = len(config.vae.channels)
    settings: dict[str, Any] = {  # diffusers' annotations allow less than it does
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.vae.channels,
        "layers_per_block": 1,
        "latent_channels": config.vae.latent,
        "norm_num_groups": 8,
        "sample_size": config.size,
        "force_upcast": False,
    }
    return AutoencoderKL(**settings)


def train(art: np.ndarray, config: Config, work: Path, device: torch.device) -> AutoencoderKL:
    """`art`: uint8 `[subject, style, size, size, 3]` of trained subjects in trained styles only."""
    settings, torch_rng = config.vae, torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = build(config)
    model.to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.0)
    saved = work / "vae.safetensors"
    start = checkpoint.load(saved, {"vae": model}, optimizer, torch_rng)
    flat = art.reshape(-1, *art.shape[2:])
    last_save = began = time.monotonic()
    for step in range(start, settings.steps):
        batch = _batch(flat, settings.batch, settings.crop, torch_rng).to(device)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * min(1, step / 50) * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps))
        posterior = model.encode(batch).latent_dist  # type: ignore[union-attr]
        mean, std = posterior.mean, posterior.std
        noise = torch.randn(mean.shape, generator=torch_rng).to(device)
        out = model.decode(mean + std * noise).sample  # type: ignore[union-attr]
        loss = _distance(out, batch) + settings.kl * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            rate = (step - start + 1) / (time.monotonic() - began)
            left = (settings.steps - step) / rate / 60
            print(
                f"vae {step}/{settings.steps} loss {loss.item():.4f} {rate:.2f} steps/s, {left:.0f} min left",
                flush=True,
            )
        if time.monotonic() - last_save > 120 or step == settings.steps - 1:
            checkpoint.save(saved, step + 1, {"vae": model}, optimizer, torch_rng)
            last_save = time.monotonic()
    return model


def _distance(out: Tensor, real: Tensor) -> Tensor:
    """Mean absolute plus squared error, at full and at half size: sharp edges, right areas."""
    half = F.avg_pool2d(out - real, 2)
    return (out - real).abs().mean() + 2 * (out - real).square().mean() + half.abs().mean()


def _batch(flat: np.ndarray, count: int, crop: int, rng: torch.Generator) -> Tensor:
    """Random crops in -1..1, half of them under a random filter."""
    size = flat.shape[1]
    which = torch.randint(len(flat), (count,), generator=rng).tolist()
    corners = torch.randint(size - crop + 1, (count, 2), generator=rng).tolist()
    chosen = torch.randint(2 * len(TRAIN_FILTERS), (count,), generator=rng).tolist()
    filters = list(TRAIN_FILTERS.values())
    pictures = []
    for index, (top, left), choice in zip(which, corners, chosen, strict=True):
        picture = torch.from_numpy(np.array(flat[index])).permute(2, 0, 1)[None].float() / 255
        if choice < len(filters):
            picture = filters[choice](picture)
        pictures.append(picture[..., top : top + crop, left : left + crop])
    return torch.cat(pictures) * 2 - 1


@torch.no_grad()
def psnr(model: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions of `[n, 3, h, w]` in 0..1, through fp32."""
    values = []
    for part in (pictures * 2 - 1).split(32):
        out = model.decode(model.encode(part).latent_dist.mode()).sample.clamp(-1, 1)  # type: ignore[union-attr]
        values.append(-10 * ((out - part) / 2).square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()
