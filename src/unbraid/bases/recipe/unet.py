"""Stage 4: UNet and text encoders, jointly, on cached latents.

On a CPU the work is spread over single-threaded processes (two threads of one process disturb each
other whenever the machine does anything else); on a GPU it is one process in bf16. Both run this code.
Random numbers are a function of (step, worker), so a killed run goes on exactly where it was.
"""

import random
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from unbraid.bases.recipe import model
from unbraid.bases.recipe.captions import caption
from unbraid.bases.recipe.config import Config
from unbraid.bases.recipe.filters import TRAIN_FILTERS
from unbraid.bases.recipe.subjects import STYLE_WORDS, TRAIN_SETS

SAVE_EVERY = 500  # steps
PROBE_TIMES = (850, 700, 500)
STATE = ("weights", "ema", "exp_avg", "exp_avg_sq", "seen")  # seen: images so far


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
    """UNet and both text encoders as one module, so that one flat vector holds all that is trained."""

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

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])

    def view(self, weights: Tensor, grads: Tensor | None = None) -> None:
        """Make every parameter (and gradient) a view of one vector."""
        offset = 0
        for p in self.parameters():
            span = slice(offset, offset + p.numel())
            p.data = weights[span].view_as(p)
            if grads is not None:
                p.grad = grads[span].view_as(p)
            offset += p.numel()


def start_state(
    config: Config, tokenizer: CLIPTokenizer, work: Path, workers: int, device: torch.device
) -> dict[str, Tensor]:
    """Fresh or resumed training state as flat vectors, shared between workers when on the CPU."""
    saved = work / "unet.safetensors"
    if saved.exists():
        state = load_file(saved)
    else:
        torch.manual_seed(0)
        weights = Net(config, tokenizer).flat()
        zero = torch.zeros_like(weights)
        state = {
            "weights": weights,
            "ema": weights.clone(),
            "exp_avg": zero,
            "exp_avg_sq": zero.clone(),
            "step": torch.zeros(1),
            "seen": torch.zeros(1),
        }
    state["grads"] = torch.zeros(workers, len(state["weights"]))
    state["norms"] = torch.zeros(workers)
    if device.type == "cpu":
        return {key: value.share_memory_() for key, value in state.items()}
    return {key: value.to(device) for key, value in state.items()}


def train(
    rank: int, barrier: Any, state: dict[str, Tensor], data: Data, config: Config, work: Path, tokenizer: CLIPTokenizer
) -> None:
    """One worker of `len(state["grads"])`; each averages, steps and smooths its own share of the weights."""
    settings, device, workers = config.unet, state["weights"].device, len(state["grads"])
    if device.type == "cpu":
        torch.set_num_threads(1)
    net = Net(config, tokenizer).to(device)
    own = state["grads"][rank]
    net.view(state["weights"], own)
    share = slice(rank * len(own) // workers, (rank + 1) * len(own) // workers)
    mine = nn.Parameter(state["weights"][share])
    optimizer = torch.optim.AdamW([mine], lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    start = int(state["step"].item())
    step_count = torch.tensor(float(start), device=device)
    optimizer.state[mine] = {
        "step": step_count,
        "exp_avg": state["exp_avg"][share],
        "exp_avg_sq": state["exp_avg_sq"][share],
    }
    levels = model.scheduler().alphas_cumprod.to(device)
    began, losses = time.monotonic(), deque[Tensor](maxlen=100)
    for step in range(start, settings.steps):
        batch = draw(data, settings.batch, step * workers + rank, tokenizer, device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = v_loss(net, batch, levels)
        loss.backward()
        barrier.wait()  # all gradients are there
        mine.grad = state["grads"][:, share].mean(0)
        state["norms"][rank] = mine.grad.square().sum()
        barrier.wait()  # all have read them
        own.zero_()
        norm = state["norms"].sum().sqrt()
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm {norm} at step {step}: lower the rate and resume")
        mine.grad.mul_((1 / norm).clamp(max=1))
        rate = settings.rate * min((step + 1) / settings.warmup, 1 - step / settings.steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        state["ema"][share].lerp_(mine.data, 1 - min(settings.ema, (1 + step) / (10 + step)))
        if rank == 0:
            state["seen"] += settings.batch * workers
        barrier.wait()  # all weights are new
        losses.append(loss.detach())
        if rank == 0 and (step + 1) % 100 == 0:
            speed = (step + 1 - start) / (time.monotonic() - began)
            mean = torch.stack(list(losses)).mean().item()
            left = (settings.steps - step) / speed / 60
            print(
                f"unet {step + 1}/{settings.steps} loss {mean:.4f} {speed * settings.batch * workers:.0f} images/s {left:.0f} min left",
                flush=True,
            )
        if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == settings.steps):
            _save(state, step + 1, work)


def _save(state: dict[str, Tensor], step: int, work: Path) -> None:
    part = work / "unet.part"
    save_file({**{key: state[key] for key in STATE}, "step": torch.tensor([float(step)])}, part)
    part.replace(work / "unet.safetensors")


def ema_net(config: Config, tokenizer: CLIPTokenizer, work: Path) -> tuple[Net, int]:
    """The smoothed weights of the latest checkpoint, which are what ships, and how many images it has seen."""
    state = load_file(work / "unet.safetensors")
    net = Net(config, tokenizer)
    net.view(state["ema"])
    return net.eval().requires_grad_(False), int(state["seen"].item())


def draw(data: Data, count: int, seed: int, tokenizer: CLIPTokenizer, device: torch.device) -> Batch:
    """A random batch: half of the pictures plain, half under a filter; sizes vary so that they mean nothing."""
    rng = random.Random(seed)
    noise_rng = torch.Generator().manual_seed(seed)
    looks = list(TRAIN_FILTERS)
    index, captions, sizes = [], [], []
    for _ in range(count):
        subject, style = rng.randrange(len(data.subjects)), rng.randrange(len(TRAIN_SETS))
        look = rng.choice((0, 1 + rng.randrange(len(looks))))
        word = STYLE_WORDS[TRAIN_SETS[style]] if look == 0 else looks[look - 1]
        index.append((subject, style, look))
        captions.append(caption(data.subjects[subject], word, rng))
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
    out = net(a * batch.latents + s * batch.noise, batch.t, batch.tokens, batch.sizes)
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
