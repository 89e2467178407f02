"""The judge's training: supervised contrastive, on real icons of trained subjects in trained sets only.

Subjects × styles give both labels for free (arXiv 2004.11362). A batch shows every subject once per set; each set comes
plain, under a training filter, and under two random styles, each of which is one style label.
"""

import copy
import io
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from tools.recipe import checkpoint
from tools.recipe.pseudo_styles import random_style
from unbraid.bench.truth.filters import TRAIN_FILTERS, Filter
from unbraid.bench.truth.judge import SIZE, WEIGHTS, Judge, save_judge

DECAY = 0.05  # AdamW's weight decay
UNKNOWN = -100  # cross_entropy's label to pass over
LOOKALIKES = frozenset(  # words of subjects that differ in details: half of all, and no measure of content at this size
    "man woman men women person people face hand hands finger boy girl family couple arrow button square circle clock"
    " oclock thirty flag heart sign symbol symbols mark keycap moon child adult medal".split()
)


@dataclass(frozen=True)
class Settings:
    steps: int = 6400
    subjects: int = 24  # per batch, once in each of the four sets
    looks: tuple[float, ...] = (0.4, 0.2, 0.2, 0.2)  # shares per set: plain, one training filter, random styles
    rate: float = 2e-3
    lookalikes: float = 0.2  # how often such a subject comes up, against 1 for any other
    warmup: int = 80
    temperature: float = 0.1
    style: float = 2.0  # weight of the style losses
    ema: float = 0.995


@dataclass(frozen=True)
class Labels:
    subject: Tensor  # [n] rows of the art
    style: Tensor  # [n] styles of this batch
    known: Tensor  # [n] training set or training filter, UNKNOWN under random styles


class Centres(nn.Module):
    """One learnt centre per subject, per training set and per training filter: negatives from beyond the batch."""

    def __init__(self, subjects: int, sets: int) -> None:
        super().__init__()
        self.subjects = nn.Parameter(torch.randn(subjects, 128))
        self.styles = nn.Parameter(torch.randn(sets + len(TRAIN_FILTERS), 64))

    def forward(self, content: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of embeddings `[n, 128]`, `[n, 64]` with the centres: `[n, subjects]`, `[n, styles]`."""
        return content @ F.normalize(self.subjects).T, style @ F.normalize(self.styles).T


def train(
    art: np.ndarray, names: tuple[str, ...], work: Path, settings: Settings = Settings(), out: Path = WEIGHTS
) -> Judge:
    """`art`: uint8 `[subject, set, SIZE, SIZE, 3]`, trained subjects in trained sets only; resumes from `work`.

    Writes the averaged weights to `out` in fp16, and returns them in evaluation mode.
    """
    torch.manual_seed(0)
    pictures = torch.from_numpy(np.ascontiguousarray(art)).permute(0, 1, 4, 2, 3)
    assert pictures.shape[-1] == SIZE
    judge = Judge().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = torch.tensor([settings.lookalikes if LOOKALIKES & set(name.split("-")) else 1.0 for name in names])
    modules = {"judge": judge, "ema": copy.deepcopy(judge), "centres": Centres(len(art), art.shape[1])}
    parameters = [*judge.parameters(), *modules["centres"].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, weight_decay=DECAY)
    rng, saved = torch.Generator().manual_seed(0), work / "judge.safetensors"
    start = checkpoint.load(saved, modules, optimizer, rng)
    last_save = began = time.monotonic()
    for step in range(start, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, settings)
        content, style = _step(modules, optimizer, _batch(pictures, weights, rng, settings), settings)
        _average(modules["ema"], judge, min(settings.ema, (1 + step) / (10 + step)))
        if step % 20 == 0 or step == settings.steps - 1:
            pace = (step - start + 1) / (time.monotonic() - began)
            left = (settings.steps - step) / pace / 60
            line = f"judge {step}/{settings.steps} content {content:.3f} style {style:.3f}"
            print(f"{line} {pace:.2f} steps/s, {left:.1f} min left", flush=True)
        if time.monotonic() - last_save > 60 or step == settings.steps - 1:
            checkpoint.save(saved, step + 1, modules, optimizer, rng)
            last_save = time.monotonic()
    best = modules["ema"].eval().requires_grad_(False)
    assert isinstance(best, Judge)
    save_judge(best, out)
    return best


def reconstruction(base: Path) -> Filter:
    """What the VAE of the diffusers folder `base` makes of pictures `[n, 3, h, w]` in 0..1."""
    autoencoder = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).eval()

    @torch.no_grad()
    def reconstruct(x: Tensor) -> Tensor:
        parts = [autoencoder.encode(part).latent_dist.mode() for part in (x * 2 - 1).split(50)]  # type: ignore[union-attr]
        return torch.cat([autoencoder.decode(part).sample for part in parts]).clamp(-1, 1) / 2 + 0.5  # type: ignore[union-attr]

    return reconstruct


def contrastive(embedded: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, eq. 2) of unit rows `[n, d]` with `labels [n]`: a scalar."""
    itself = torch.eye(len(labels), dtype=torch.bool)
    scores = (embedded @ embedded.T / temperature).masked_fill(itself, -torch.inf)
    logs = scores.log_softmax(1).masked_fill(itself, 0)
    positive = ((labels[:, None] == labels) & ~itself).float()
    count = positive.sum(1)
    return -((logs * positive).sum(1) / count.clamp(min=1))[count > 0].mean()


def _step(
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Labels],
    settings: Settings,
) -> tuple[float, float]:
    pictures, labels = batch
    content, style = modules["judge"](pictures.contiguous(memory_format=torch.channels_last))
    content_loss = contrastive(content, labels.subject, settings.temperature)
    style_loss = contrastive(style, labels.style, settings.temperature)
    to_subject, to_style = modules["centres"](content, style)
    known = F.cross_entropy(to_style / settings.temperature, labels.known)
    loss = content_loss + F.cross_entropy(to_subject / settings.temperature, labels.subject)
    optimizer.zero_grad()
    (loss + settings.style * (style_loss + known)).backward()
    optimizer.step()
    return content_loss.item(), style_loss.item()


def _batch(art: Tensor, weights: Tensor, rng: torch.Generator, settings: Settings) -> tuple[Tensor, Labels]:
    sets, looks, dice = art.shape[1], len(settings.looks), random.Random(_integer(rng, 2**31))
    chosen = torch.multinomial(weights, settings.subjects, generator=rng)
    named = dice.sample(list(enumerate(TRAIN_FILTERS.values())), sets)  # one filter on two sets: a false negative
    pictures, subject, style, known = [], [], [], []
    for i, (filter_id, named_filter) in enumerate(named):
        looking = torch.multinomial(torch.tensor(settings.looks), len(chosen), replacement=True, generator=rng)
        filters: list[Filter | None] = [None, named_filter, *(random_style(dice) for _ in range(looks - 2))]
        for j, look in enumerate(filters):
            who = chosen[looking == j]
            plain = art[who, i].float() / 255
            pictures.append(look(plain).expand_as(plain) if look else plain)
            subject.append(who)
            style.append(torch.full_like(who, i * looks + j))
            known.append(torch.full_like(who, (i, sets + filter_id)[j] if j < 2 else UNKNOWN))
    return worn(torch.cat(pictures), rng), Labels(torch.cat(subject), torch.cat(style), torch.cat(known))


def worn(x: Tensor, rng: torch.Generator) -> Tensor:
    """Accidents that are neither content nor style: moved, turned, mirrored, tinted, resampled, JPEG'd, noisy."""
    x = _moved(x, rng)
    tint = 1 + 0.04 * (2 * torch.rand(len(x), 3, 1, 1, generator=rng) - 1) * _some(len(x), 0.5, rng)
    x = 1 - (1 - x) * tint  # about white, as most paper is
    soft = F.interpolate(x, SIZE // 3 + _integer(rng, 2 * SIZE // 3), mode="bilinear", antialias=True)
    soft = F.interpolate(soft, x.shape[-1], mode="bicubic")
    x = torch.where(_some(len(x), 0.55, rng) > 0, soft, x).clamp(0, 1)
    for i in (_some(len(x), 0.1, rng) > 0).flatten().nonzero()[:, 0].tolist():
        x[i] = _jpeg(x[i], 30 + _integer(rng, 60))
    strength = 0.03 * torch.rand(len(x), 1, 1, 1, generator=rng) * _some(len(x), 0.3, rng)
    return (x + strength * torch.randn(x.shape, generator=rng)).clamp(0, 1)


def _moved(x: Tensor, rng: torch.Generator) -> Tensor:
    """Rotated ±11°, scaled to 73–113 %, squeezed ±8 %, shifted ±6 %, three in ten mirrored."""
    rolls = 2 * torch.rand(len(x), 5, generator=rng) - 1
    angle, scale, squeeze = rolls[:, 0] * 0.2, (rolls[:, 1] * 0.22 + 0.1).exp(), (rolls[:, 2] * 0.08).exp()
    mirror = 1 - 2 * _some(len(x), 0.3, rng).flatten()
    first = torch.stack([angle.cos() * scale * squeeze * mirror, -angle.sin() * scale, rolls[:, 3] * 0.12], 1)
    second = torch.stack([angle.sin() * scale * mirror, angle.cos() * scale / squeeze, rolls[:, 4] * 0.12], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _jpeg(picture: Tensor, quality: int) -> Tensor:
    pixels = (picture * 255).byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255


def _some(count: int, share: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(count, 1, 1, 1, generator=rng) < share).float()


def _integer(rng: torch.Generator, limit: int) -> int:
    return int(torch.randint(limit, (1,), generator=rng))


def _rate(step: int, settings: Settings) -> float:
    fall = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
    return settings.rate * min(1, (step + 1) / settings.warmup) * max(fall, 0.01)


@torch.no_grad()
def _average(ema: nn.Module, model: nn.Module, keep: float) -> None:
    for old, new in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - keep)
        else:
            old.copy_(new)
