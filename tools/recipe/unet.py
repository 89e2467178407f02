"""Stage 4: UNet and text encoders, jointly, on cached latents."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tools.recipe import model, parallel
from tools.recipe.captions import RARE_TOKENS, caption
from tools.recipe.config import Config
from unbraid.bench.truth.filters import HELD_OUT_FILTERS, TRAIN_FILTERS
from unbraid.bench.truth.subjects import HELD_OUT_SETS, STYLE_WORDS, TRAIN_SETS, held_out

FILE = "unet.safetensors"
PROBE_TIMES = (850, 700, 500)


@dataclass(frozen=True)
class Data:
    """Scaled latents `[subject, style, 1 + filters, c, h, w]`, the names of the first axis, the pictures' side in pixels."""

    latents: Tensor
    subjects: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # [b, c, h, w]
    noise: Tensor  # as latents
    t: Tensor  # [b]
    tokens: Tensor  # [b, TOKENS]
    sizes: Tensor  # [b, 6], SDXL's micro-conditioning


class Net(nn.Module):
    """UNet and both text encoders as one module: all that is trained."""

    def __init__(self, config: Config, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = model.build_unet(config)
        self.text, self.text_2 = model.build_text_encoders(config, tokenizer)

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor, sizes: Tensor) -> Tensor:
        first = self.text(tokens, output_hidden_states=True)
        second = self.text_2(tokens, output_hidden_states=True)
        prompt = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        added = {"text_embeds": second.text_embeds, "time_ids": sizes}
        return self.unet(noisy, t, prompt, added_cond_kwargs=added).sample


def train(data: Data, config: Config, work: Path, tokenizer: CLIPTokenizer, workers: int, device: torch.device) -> None:
    torch.manual_seed(0)
    state = parallel.start_state(Net(config, tokenizer), work / FILE, workers, device, parallel.half(device))
    data.latents.share_memory_()
    parallel.spawn(worker, state, data, config, work, tokenizer)


def worker(
    rank: int, barrier: Any, state: parallel.State, data: Data, config: Config, work: Path, tokenizer: CLIPTokenizer
) -> None:
    settings, device = config.unet, state["weights"].device
    net = Net(config, tokenizer).to(device)
    net.unet.set_attn_processor(AttnProcessor())  # for a few positions, the fused one's gradient is slow on a CPU
    levels = model.scheduler().alphas_cumprod.to(device)

    def loss(step: int, seed: int) -> tuple[Tensor, int]:
        del step
        batch = draw(data, settings.batch, seed, tokenizer, device)
        return v_loss(net, batch, levels), settings.batch

    schedule = parallel.Schedule("unet", settings.steps, settings.rate, settings.warmup, settings.ema, settings.muon)
    parallel.train(rank, barrier, state, net, loss, schedule, work / FILE)


def ema_net(config: Config, tokenizer: CLIPTokenizer, work: Path) -> tuple[Net, int]:
    """The averaged weights of the latest checkpoint, and how many images it has seen."""
    return parallel.smoothed(Net(config, tokenizer), work / FILE)


def draw(data: Data, count: int, seed: int, tokenizer: CLIPTokenizer, device: torch.device) -> Batch:
    """A random batch: half of the pictures plain, half under a filter; sizes vary so that they mean nothing."""
    rng = random.Random(seed)
    noise_rng = torch.Generator().manual_seed(seed)
    looks, blanks = list(TRAIN_FILTERS), nothing()
    index, captions, sizes = [], [], []
    for _ in range(count):
        subject, style = rng.randrange(len(data.subjects)), rng.randrange(len(TRAIN_SETS))
        look = rng.choice((0, 1 + rng.randrange(len(looks))))
        word = STYLE_WORDS[TRAIN_SETS[style]] if look == 0 else looks[look - 1]
        index.append((subject, style, look))
        captions.append(caption(data.subjects[subject], word, rng, blanks))
        sizes.append(_sizes(rng, data.size))
    clean = torch.stack([data.latents[i] for i in index]).to(device)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return Batch(
        clean,
        torch.randn(clean.shape, generator=noise_rng).to(device),
        torch.randint(1000, (count,), generator=noise_rng).to(device),
        tokens.to(device),
        torch.tensor(sizes, device=device),
    )


def nothing() -> tuple[str, ...]:
    """Words that are never trained with a meaning: those of what is held out, and the rare ones."""
    styles = (STYLE_WORDS[name] for name in HELD_OUT_SETS)
    return (*held_out(), *HELD_OUT_FILTERS, *styles, *RARE_TOKENS)


def _sizes(rng: random.Random, target: int) -> list[int]:
    """Original size, crop corner, target size. Icons have no native size: one in ten is random, so that the
    base takes any user's picture in its stride."""
    if rng.random() < 0.9:
        return [target, target, 0, 0, target, target]
    return [rng.randrange(32, 2048), rng.randrange(32, 2048), rng.randrange(64), rng.randrange(64), target, target]


def v_loss(net: Net, batch: Batch, levels: Tensor) -> Tensor:
    """Mean squared error of v = a·noise - s·x (arXiv 2202.00512), unweighted."""
    a = levels[batch.t].sqrt()[:, None, None, None]
    s = (1 - levels[batch.t]).sqrt()[:, None, None, None]
    noisy = (a * batch.latents + s * batch.noise).to(net.unet.dtype)
    out = net(noisy, batch.t, batch.tokens, batch.sizes)
    return F.mse_loss(out.float(), a * batch.noise - s * batch.latents)


@torch.no_grad()
def subject_gain(net: Net, data: Data, tokenizer: CLIPTokenizer) -> dict[int, float]:
    """(loss with a wrong subject in the caption - loss with the right one) / right, per timestep.

    It rises long before pictures look right."""
    rng, noise_rng, n = random.Random(0), torch.Generator().manual_seed(0), 48
    picks = [(rng.randrange(len(data.subjects)), rng.randrange(len(TRAIN_SETS))) for _ in range(n)]
    clean = torch.stack([data.latents[subject, style, 0] for subject, style in picks])
    noise = torch.randn(clean.shape, generator=noise_rng)
    sizes = torch.tensor([_sizes(random.Random(1), data.size)] * n)
    levels, gains = model.scheduler().alphas_cumprod, {}
    for t in PROBE_TIMES:
        losses = []
        for shift in (0, 1):
            words = [
                f"a {data.subjects[(s + shift) % len(data.subjects)]} in {STYLE_WORDS[TRAIN_SETS[style]]} style"
                for s, style in picks
            ]
            tokens = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
            losses.append(v_loss(net, Batch(clean, noise, torch.full((n,), t), tokens, sizes), levels).item())
        gains[t] = (losses[1] - losses[0]) / losses[0]
    return gains
