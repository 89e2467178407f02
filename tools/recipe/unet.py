"""Stage 4: UNet and text encoders, jointly, on cached latents."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools.recipe import config, model, parallel
from tools.recipe.config import Schedule
from tools.recipe.latents import Tables
from unbraid.bench.truth.subjects import STYLE_WORDS, TRAIN_SETS

FILE = "unet.safetensors"
PROBE_TIMES = (850, 700, 500)


class Batch(NamedTuple):
    latents: Tensor  # [b, c, h, w]
    noise: Tensor  # as latents
    t: Tensor  # [b]
    tokens: Tensor  # [b, TOKENS]
    sizes: Tensor  # [b, 6], SDXL's micro-conditioning


class Net(nn.Module):
    """UNet and both text encoders as one module: all that is trained. `start`: diffusers folder whose weights to begin with."""

    def __init__(self, tokenizer: CLIPTokenizer, start: Path | None = None) -> None:
        super().__init__()
        if start is None:
            self.unet = model.build_unet(config.SIZES)
            self.text, self.text_2 = model.build_text_encoders(config.SIZES, tokenizer)
            return
        self.unet = UNet2DConditionModel.from_pretrained(start / "unet", torch_dtype=torch.float32)
        self.text = CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32)
        self.text_2 = CLIPTextModelWithProjection.from_pretrained(start / "text_encoder_2", dtype=torch.float32)

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor, sizes: Tensor) -> Tensor:
        first = self.text(tokens, output_hidden_states=True)
        second = self.text_2(tokens, output_hidden_states=True)
        prompt = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        added = {"text_embeds": second.text_embeds, "time_ids": sizes}
        return self.unet(noisy, t, prompt, added_cond_kwargs=added).sample


def train(
    tables: Tables,
    schedule: Schedule,
    work: Path,
    tokenizer: CLIPTokenizer,
    workers: int,
    device: torch.device,
    start: Path | None,
) -> None:
    torch.manual_seed(0)
    state = parallel.start_state(Net(tokenizer, start), work / FILE, workers, device, parallel.half(device))
    parallel.spawn(_worker, state, tables.share_memory() if device.type == "cpu" else tables, schedule, work, tokenizer)


def _worker(
    rank: int,
    barrier: Any,
    state: parallel.State,
    tables: Tables,
    schedule: Schedule,
    work: Path,
    tokenizer: CLIPTokenizer,
) -> None:
    device = state["weights"].device
    net, tables = Net(tokenizer).to(device), tables.to(device)
    # For a few positions, the fused processor's gradient is slow on a CPU.
    net.unet.set_attn_processor(AttnProcessor() if device.type == "cpu" else AttnProcessor2_0())
    levels = model.scheduler().alphas_cumprod.to(device)

    def batch(seed: int) -> Batch:
        return draw(tables, schedule.batch, torch.Generator(device).manual_seed(seed))

    def loss(*drawn: Tensor) -> Tensor:
        return v_loss(net, Batch(*drawn), levels)

    parallel.train(rank, barrier, state, net, parallel.Training(batch, loss, schedule, work / FILE))


def ema_net(tokenizer: CLIPTokenizer, work: Path) -> tuple[Net, int]:
    """The averaged weights of the latest checkpoint, and how many images it has seen."""
    return parallel.smoothed(Net(tokenizer), work / FILE)


def draw(tables: Tables, count: int, rng: torch.Generator) -> Batch:
    """A random batch: `config.PLAIN` of the pictures plain, the rest under a filter."""
    device, (subjects, sets, looks) = tables.latents.device, tables.latents.shape[:3]

    def integers(limit: int, n: int = count) -> Tensor:
        return torch.randint(limit, (n,), generator=rng, device=device)

    def rolls(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng, device=device)

    subject = torch.searchsorted(tables.shares, rolls(count)).clamp(max=subjects - 1)
    of, look = integers(sets), integers(looks - 1) + 1
    look = torch.where(rolls(count) < config.PLAIN, 0, look)
    style = torch.where(look == 0, of, sets - 1 + look)
    clean = tables.latents[subject, of, look].float()
    return Batch(
        clean,
        torch.randn(clean.shape, generator=rng, device=device),
        integers(1000),
        tables.tokens[subject, style, integers(tables.tokens.shape[2])].long(),
        _sizes(rolls(count, 5)),
    )


def _sizes(rolls: Tensor) -> Tensor:
    """Original size, crop corner, target size `[n, 6]`, from `[n, 5]` in 0..1. Icons have no native size: one in ten is random, so
    that the base takes any user's picture in its stride."""
    side = config.SIZES.pixels
    usual = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=rolls.device).expand(len(rolls), 6)
    limits = torch.tensor([2016.0, 2016.0, 64.0, 64.0], device=rolls.device)
    least = torch.tensor([32.0, 32.0, 0.0, 0.0], device=rolls.device)
    other = torch.cat([(rolls[:, :4] * limits + least).floor(), usual[:, 4:]], 1)
    return torch.where(rolls[:, 4:] < 0.9, usual, other)


def v_loss(net: Net, batch: Batch, levels: Tensor) -> Tensor:
    """Mean squared error of v = a·noise - s·x (arXiv 2202.00512), unweighted."""
    a = levels[batch.t].sqrt()[:, None, None, None]
    s = (1 - levels[batch.t]).sqrt()[:, None, None, None]
    noisy = (a * batch.latents + s * batch.noise).to(net.unet.dtype)
    out = net(noisy, batch.t, batch.tokens, batch.sizes)
    return F.mse_loss(out.float(), a * batch.noise - s * batch.latents)


@torch.no_grad()
def subject_gain(net: Net, latents: Tensor, subjects: tuple[str, ...], tokenizer: CLIPTokenizer) -> dict[int, float]:
    """(loss with a wrong subject in the caption - loss with the right one) / right, per timestep.
    `latents`: as in Tables.

    It rises long before pictures look right."""
    rng, n = torch.Generator().manual_seed(0), 48
    subject = torch.randint(len(subjects), (n,), generator=rng)
    style = torch.randint(len(TRAIN_SETS), (n,), generator=rng)
    clean = latents[subject, style, 0].float()
    noise = torch.randn(clean.shape, generator=rng)
    sizes = _sizes(torch.zeros(n, 5))
    levels, gains = model.scheduler().alphas_cumprod, {}
    for t in PROBE_TIMES:
        losses = []
        for shift in (0, 1):
            lines = [
                f"a {subjects[(s + shift) % len(subjects)]} in {STYLE_WORDS[TRAIN_SETS[k]]} style"
                for s, k in zip(subject.tolist(), style.tolist(), strict=True)
            ]
            tokens = tokenizer(lines, padding="max_length", truncation=True, return_tensors="pt").input_ids
            losses.append(v_loss(net, Batch(clean, noise, torch.full((n,), t), tokens, sizes), levels).item())
        gains[t] = (losses[1] - losses[0]) / losses[0]
    return gains
