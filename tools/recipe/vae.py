"""Stage 3: the autoencoder. Trained on crops, then whole pictures, of real icons under random filters, inks and tints."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from tools.recipe import parallel
from tools.recipe.config import Config
from unbraid.bench.truth.filters import TRAIN_FILTERS, edges

FILE, DECODER = "vae.safetensors", "decoder.safetensors"


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
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**settings)


def train(art: np.ndarray, config: Config, work: Path, workers: int, device: torch.device) -> AutoencoderKL:
    """`art`: uint8 `[subject, style, size, size, 3]` of trained subjects in trained styles only."""
    saved = work / FILE
    torch.manual_seed(0)
    model = build(config)
    state = parallel.start_state(model, saved, workers, device, parallel.half(device))
    pictures = torch.from_numpy(np.array(art)).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    parallel.spawn(worker, state, pictures.share_memory_(), config, saved)
    return parallel.smoothed(build(config), saved)[0].to(device)


def worker(rank: int, barrier: Any, state: parallel.State, pictures: Tensor, config: Config, saved: Path) -> None:
    settings, device, dtype = config.vae, state["weights"].device, state["compute"].dtype
    model: Any = build(config).to(device)  # type: ignore[arg-type]

    def loss(step: int, seed: int) -> tuple[Tensor, int]:
        whole = step >= settings.steps * (1 - settings.whole)
        crop = config.size if whole else settings.crop
        count = max(1, settings.batch * settings.crop**2 // crop**2)
        real = batch(pictures, count, crop, seed).to(device)
        posterior = DiagonalGaussianDistribution(model.encode(real.to(dtype)).latent_dist.parameters.float())
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed)).to(device)
        out = model.decode((posterior.mean + posterior.std * noise).to(dtype)).sample.float()
        return distance(out, real) + settings.kl * posterior.kl().mean(), count

    schedule = parallel.Schedule("vae", settings.steps, settings.rate, 50, settings.ema, settings.muon)
    parallel.train(rank, barrier, state, model, loss, schedule, saved)


def harden(art: np.ndarray, config: Config, work: Path, workers: int, device: torch.device) -> None:
    """Train the decoder further, alone, on latents with noise. A UNet's latents are not an encoder's: what it cannot predict
    stays as noise in them, and a decoder that has never seen any draws it as texture."""
    saved = work / DECODER
    model, _ = parallel.smoothed(build(config), work / FILE)
    part = decoder(model).requires_grad_(True)
    state = parallel.start_state(part, saved, workers, device, parallel.half(device))
    pictures = torch.from_numpy(np.array(art)).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    parallel.spawn(hardener, state, pictures.share_memory_(), config, work)


def hardener(rank: int, barrier: Any, state: parallel.State, pictures: Tensor, config: Config, work: Path) -> None:
    settings, device = config.vae, state["weights"].device
    model: Any = parallel.smoothed(build(config), work / FILE)[0].to(device)
    part = decoder(model).requires_grad_(True)
    count = max(1, settings.batch * settings.crop**2 // config.size**2)

    def loss(step: int, seed: int) -> tuple[Tensor, int]:
        del step
        rng = torch.Generator().manual_seed(seed)
        real = batch(pictures, count, config.size, seed).to(device)
        with torch.no_grad():
            clean = model.encode(real).latent_dist.mode()
        strength = settings.noise * torch.rand(count, 1, 1, 1, generator=rng)
        noise = (strength * torch.randn(clean.shape, generator=rng)).to(device)
        noisy = (clean + clean.std() * noise).to(state["compute"].dtype)
        out = model.decode(noisy).sample.float()
        return distance(out, real), count

    schedule = parallel.Schedule("decoder", settings.hardening, settings.rate, 50, settings.ema, settings.muon)
    parallel.train(rank, barrier, state, part, loss, schedule, work / DECODER)


def decoder(model: AutoencoderKL) -> nn.ModuleDict:
    parts: dict[str, Any] = {"post_quant_conv": model.post_quant_conv, "decoder": model.decoder}
    return nn.ModuleDict(parts)


def load(config: Config, work: Path) -> AutoencoderKL:
    """The finished autoencoder, or what there is of it."""
    model, _ = parallel.smoothed(build(config), work / FILE)
    if (work / DECODER).exists():
        parallel.smoothed(decoder(model), work / DECODER)
    return model


def distance(out: Tensor, real: Tensor) -> Tensor:
    """Mean absolute plus squared error, at full and at half size: sharp edges, right areas; and of the differences between
    neighbours: what tells flat from shaded, and blur from an edge."""
    error = out - real
    steps = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + F.avg_pool2d(error, 2).abs().mean() + steps


def batch(pictures: Tensor, count: int, crop: int, seed: int) -> Tensor:
    """Random crops `[count, 3, crop, crop]` in -1..1 of uint8 `pictures [n, 3, h, w]`."""
    rng, size, crops = random.Random(seed), pictures.shape[-1], []
    for _ in range(count):
        x = _varied(pictures[rng.randrange(len(pictures)), None].float() / 255, rng)
        top, left = rng.randrange(size - crop + 1), rng.randrange(size - crop + 1)
        crops.append(x[..., top : top + crop, left : left + crop])
    return torch.cat(crops) * 2 - 1


def _varied(x: Tensor, rng: random.Random) -> Tensor:
    """A third under a filter, a quarter inked along its edges, a fifth in other colours: the autoencoder must keep
    pictures that no training set has."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(list(TRAIN_FILTERS.values()))(x).expand_as(x)
    if kind < 0.6:
        ink = edges(x) > rng.uniform(0.1, 0.6)
        if rng.random() < 0.5:
            x = (x - 0.5) * rng.uniform(0, 1.5) + rng.uniform(0.3, 1)
        return torch.where(ink, 0, x).clamp(0, 1)
    if kind < 0.8:
        x = x[:, rng.sample(range(3), 3)]
        return ((x - 0.5) * rng.uniform(0.5, 3) + 0.5).clamp(0, 1)
    return x


@torch.no_grad()
def psnr(model: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions of `[n, 3, h, w]` in 0..1, through fp32."""
    values = []
    for part in (pictures * 2 - 1).split(32):
        out = model.decode(model.encode(part).latent_dist.mode()).sample.clamp(-1, 1)  # type: ignore[union-attr]
        values.append(-10 * ((out - part) / 2).square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()
