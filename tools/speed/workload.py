"""What `tools.speed` trains on: the embedded base, and SDXL with random weights at half and full width."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from tools.speed.published import Pictures
from unbraid.bases.base import Base, load
from unbraid.bases.families.family import Prompt
from unbraid.bench.measure import SDXL, VAE
from unbraid.bench.truth.art import held_out_art

WORDS = ("both", "content", "style", "lora", "module")


@dataclass(frozen=True)
class Workload:
    """A base, prompts for all roles, and a function that encodes one picture for each of the roles given."""

    base: Base
    prompts: dict[str, Prompt]
    encode: Callable[[Sequence[str]], Pictures]
    rank: int
    title: str


def icons(device: str) -> Workload:
    """The embedded base and a held-out picture."""
    base = load("icons", device)
    pixels = held_out_art().picture("fox", "openmoji") * 2 - 1
    prompts = {role: base.encode_prompt(f"a {role}") for role in WORDS}
    return Workload(base, prompts, _encoder(base, pixels), 16, f"icons, {base.size} px, rank 16, {device}")


def half(device: str, side: int = 256) -> Workload:
    """SDXL at half its width, with 1, 1 and 2 transformer layers in place of 1, 2 and 10."""
    small = {
        "block_out_channels": (160, 320, 640),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 1024,
        "sample_size": side // 8,
    }
    vae = {"block_out_channels": (64, 128, 256, 256)}
    title = f"half-width SDXL of depth 1, 1, 2, {side} px, rank 32, {device}"
    return _random(device, side, 32, SDXL | small, VAE | vae, title)


def full(device: str, side: int) -> Workload:
    """SDXL at full size, for pictures of `side` px."""
    return _random(device, side, 64, SDXL, VAE, f"SDXL, {side} px, rank 64, {device}")


def _random(device: str, side: int, rank: int, unet: dict[str, Any], vae: dict[str, Any], title: str) -> Workload:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    pipe = copy.copy(load("icons", "cpu").pipe)
    pipe.unet = UNet2DConditionModel(**unet).to(device, dtype).requires_grad_(False).eval()  # type: ignore[arg-type]
    pipe.vae = AutoencoderKL(**vae).to(device).requires_grad_(False).eval()  # type: ignore[arg-type]
    base = Base(title, pipe, torch.device(device))
    width = unet["cross_attention_dim"]
    prompts = {
        role: Prompt(torch.randn(77, width, device=device, dtype=dtype), torch.randn(1280, device=device, dtype=dtype))
        for role in WORDS
    }
    return Workload(base, prompts, _encoder(base, torch.rand(3, side, side) * 2 - 1), rank, title)


def _encoder(base: Base, pixels: torch.Tensor) -> Callable[[Sequence[str]], Pictures]:
    _, height, width = pixels.shape
    return lambda roles: {role: [base.encode_picture(pixels, (height, width, 0, 0, height, width))] for role in roles}
