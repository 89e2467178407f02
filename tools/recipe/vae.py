"""Stage 3: the autoencoder, trained on real icons under random filters, inks and tints."""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from tools.recipe import config, parallel
from tools.recipe.config import ANCHOR, DECODER_NOISE, KL, NOISE, Schedule, Sizes
from unbraid.bench.truth.filters import TRAIN_FILTERS, edges

FILE, DECODER = "vae.safetensors", "decoder.safetensors"


def build(sizes: Sizes) -> AutoencoderKL:
    levels = len(sizes.vae)
    settings: dict[str, Any] = {  # diffusers' annotations allow less than it does
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": sizes.vae,
        "layers_per_block": 1,
        "latent_channels": sizes.latent,
        "norm_num_groups": 8,
        "sample_size": sizes.pixels,
        "force_upcast": False,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**settings)


def read(start: Path | None) -> AutoencoderKL:
    """The autoencoder of the diffusers folder `start` in fp32; without one, random weights."""
    if start is None:
        return build(config.SIZES)
    return AutoencoderKL.from_pretrained(start / "vae", torch_dtype=torch.float32)


def train(
    pictures: Tensor, schedule: Schedule, work: Path, workers: int, device: torch.device, start: Path | None
) -> AutoencoderKL:
    """`pictures`: uint8 `[n, 3, size, size]` of trained subjects in trained styles only. `start`: diffusers folder to go on from;
    its latents stay nearly what they are, so that the UNet that knows them keeps drawing."""
    torch.manual_seed(0)
    state = parallel.start_state(read(start), work / FILE, workers, device, parallel.half(device))
    parallel.spawn(_worker, state, pictures.share_memory_(), schedule, work, start)
    return parallel.smoothed(build(config.SIZES), work / FILE)[0].to(device)


def _worker(
    rank: int, barrier: Any, state: parallel.State, pictures: Tensor, schedule: Schedule, work: Path, start: Path | None
) -> None:
    device, dtype = state["weights"].device, state["compute"].dtype
    model: Any = build(config.SIZES).to(device)  # type: ignore[arg-type]
    old = read(start).to(device).eval().requires_grad_(False) if start else None  # type: ignore[arg-type]
    cells = pictures.shape[-1] // 2 ** (len(config.SIZES.vae) - 1)

    def draw(seed: int) -> tuple[Tensor, ...]:
        rng, count = torch.Generator().manual_seed(seed), schedule.batch
        noise = torch.randn(count, config.SIZES.latent, cells, cells, generator=rng)
        strength = NOISE * torch.rand(count, 1, 1, 1, generator=rng).square()
        return batch(pictures, count, seed).to(device), noise.to(device), strength.to(device)

    def loss(real: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
        posterior = model.encode(real.to(dtype)).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        noisy = mean + (deviation + strength * mean.detach().std()) * noise
        total = distance(model.decode(noisy.to(dtype)).sample.float(), real)
        if old is None:
            return total + KL * posterior.kl().mean()
        target = old.encode(real).latent_dist.mode()  # type: ignore[union-attr]
        return total + ANCHOR * F.mse_loss(mean, target) / target.var()

    parallel.train(rank, barrier, state, model, parallel.Training(draw, loss, schedule, work / FILE))


def harden(pictures: Tensor, schedule: Schedule, work: Path, workers: int, device: torch.device) -> None:
    """Train the decoder further, alone, on latents with noise. A UNet's latents are not an encoder's: what it cannot predict
    stays as noise in them, and a decoder that has never seen any draws it as texture."""
    model, _ = parallel.smoothed(build(config.SIZES), work / FILE)
    part = decoder(model).requires_grad_(True)
    state = parallel.start_state(part, work / DECODER, workers, device, parallel.half(device))
    parallel.spawn(_hardener, state, pictures.share_memory_(), schedule, work)


def _hardener(rank: int, barrier: Any, state: parallel.State, pictures: Tensor, schedule: Schedule, work: Path) -> None:
    device = state["weights"].device
    model: Any = parallel.smoothed(build(config.SIZES), work / FILE)[0].to(device)
    part = decoder(model).requires_grad_(True)
    cells = pictures.shape[-1] // 2 ** (len(config.SIZES.vae) - 1)

    def draw(seed: int) -> tuple[Tensor, ...]:
        rng, count = torch.Generator().manual_seed(seed), schedule.batch
        strength = DECODER_NOISE * torch.rand(count, 1, 1, 1, generator=rng)
        noise = strength * torch.randn(count, config.SIZES.latent, cells, cells, generator=rng)
        return batch(pictures, count, seed).to(device), noise.to(device)

    def loss(real: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            clean = model.encode(real).latent_dist.mode()
        noisy = (clean + clean.std() * noise).to(state["compute"].dtype)
        return distance(model.decode(noisy).sample.float(), real)

    parallel.train(rank, barrier, state, part, parallel.Training(draw, loss, schedule, work / DECODER))


def decoder(model: AutoencoderKL) -> nn.ModuleDict:
    parts: dict[str, Any] = {"post_quant_conv": model.post_quant_conv, "decoder": model.decoder}
    return nn.ModuleDict(parts)


def load(work: Path) -> AutoencoderKL:
    """The finished autoencoder, or what there is of it."""
    model, _ = parallel.smoothed(build(config.SIZES), work / FILE)
    if (work / DECODER).exists():
        parallel.smoothed(decoder(model), work / DECODER)
    return model


def distance(out: Tensor, real: Tensor) -> Tensor:
    """Mean absolute plus squared error, at full and at half size: sharp edges, right areas; and of the differences between
    neighbours: what tells flat from shaded, and blur from an edge."""
    error = out - real
    steps = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + F.avg_pool2d(error, 2).abs().mean() + steps


def batch(pictures: Tensor, count: int, seed: int) -> Tensor:
    """Random pictures `[count, 3, h, w]` in -1..1 of uint8 `pictures [n, 3, h, w]`, each in a look of its own."""
    rng = random.Random(seed)
    chosen = (pictures[rng.randrange(len(pictures)), None].float() / 255 for _ in range(count))
    return torch.cat([_varied(x, rng) for x in chosen]) * 2 - 1


def _varied(x: Tensor, rng: random.Random) -> Tensor:
    """A quarter under a filter, two fifths inked along their edges, a seventh in other colours: the autoencoder must keep
    pictures that no training set has."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(list(TRAIN_FILTERS.values()))(x).expand_as(x)
    if kind < 0.65:
        return _inked(x, rng)
    if kind < 0.8:
        x = x[:, rng.sample(range(3), 3)]
        return ((x - 0.5) * rng.uniform(0.5, 3) + 0.5).clamp(0, 1)
    return x


def _inked(x: Tensor, rng: random.Random) -> Tensor:
    """Dark lines along the edges, hard or soft, thin or thick; on the picture, on a faded one, or on white."""
    threshold = rng.uniform(0.1, 0.6)
    ink = torch.sigmoid((edges(x) - threshold) * rng.uniform(6, 60))
    if rng.random() < 0.4:
        ink = F.avg_pool2d(F.pad(ink, (1, 1, 1, 1), mode="replicate"), 3, 1).mul(1.5).clamp(0, 1)
    paper = rng.random()
    if paper < 0.35:
        x = (x - 0.5) * rng.uniform(0, 1.5) + rng.uniform(0.3, 1)
    elif paper < 0.6:
        x = torch.ones_like(x)
    return (x * (1 - ink)).clamp(0, 1)


@torch.no_grad()
def psnr(model: AutoencoderKL, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions of `[n, 3, h, w]` in 0..1, through fp32."""
    values = []
    for part in (pictures * 2 - 1).split(32):
        out = model.decode(model.encode(part).latent_dist.mode()).sample.clamp(-1, 1)  # type: ignore[union-attr]
        values.append(-10 * ((out - part) / 2).square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()
