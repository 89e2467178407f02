"""The tables between autoencoder and UNet: every trained picture under every filter, encoded once, and its captions as tokens."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from tools.recipe import words
from tools.recipe.captions import caption
from unbraid.bench.truth.filters import TRAIN_FILTERS

FILE, TOKENS_FILE = "latents.safetensors", "tokens.safetensors"
VARIANTS = 16  # captions of each subject in each style


@dataclass(frozen=True)
class Tables:
    """All that batches are drawn from, so that drawing is indexing, on any device."""

    latents: Tensor  # [subject, set, 1 + filters, c, h, w], scaled; half precision
    tokens: Tensor  # [subject, style, VARIANTS, TOKENS], int16; styles in the order of words.STYLES
    shares: Tensor  # [subject], cumulative: how often each comes up

    def to(self, device: torch.device) -> "Tables":
        return Tables(self.latents.to(device), self.tokens.to(device), self.shares.to(device))

    def share_memory(self) -> "Tables":
        return Tables(*(table.share_memory_() for table in (self.latents, self.tokens, self.shares)))


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: Tensor, work: Path, scale: float | None) -> tuple[Tensor, float]:
    """Scaled latents `[subject, set, 1 + filters, c, h, w]` of uint8 `pictures [subject, set, 3, h, w]`, and the scale.

    `scale`: that of the base that training started from. Without one, the one that brings the latents to unit variance; whitening
    channel by channel was tried and is worse (docs/LOG.md)."""
    saved = work / FILE
    if not saved.exists():
        rows, device = [], next(model.parameters()).device
        for subject in track(pictures, "encoding", transient=True):
            x = subject.to(device).float() / 255
            looks = torch.stack([x, *(f(x).expand_as(x) for f in TRAIN_FILTERS.values())], 1)
            mean = model.encode(looks.flatten(0, 1) * 2 - 1).latent_dist.mode()  # type: ignore[union-attr]
            rows.append(mean.unflatten(0, looks.shape[:2]).half().cpu())
        latents = torch.stack(rows)
        factor = torch.tensor([scale or 1 / latents.float().std().item()])
        part = saved.with_suffix(".part")
        save_file({"latents": (latents.float() * factor).half(), "scale": factor}, part)
        part.rename(saved)
    file = load_file(saved)
    return file["latents"], file["scale"].item()


def tokenise(subjects: tuple[str, ...], tokenizer: CLIPTokenizer, work: Path) -> Tensor:
    """Captions of every subject in every style as token ids: int16 `[subject, style, VARIANTS, TOKENS]`."""
    saved = work / TOKENS_FILE
    if not saved.exists():
        rng, rows = random.Random(0), []
        for subject in track(subjects, "captions", transient=True):
            lines = [caption(subject, style, rng, words.NOTHING) for style in words.STYLES for _ in range(VARIANTS)]
            ids = tokenizer(lines, padding="max_length", truncation=True, return_tensors="pt").input_ids
            rows.append(ids.to(torch.int16).unflatten(0, (len(words.STYLES), VARIANTS)))
        part = saved.with_suffix(".part")
        save_file({"tokens": torch.stack(rows)}, part)
        part.rename(saved)
    return load_file(saved)["tokens"]
