"""LoRAs on every layer of a tiny checkpoint."""

import torch
from tiny_bases import Tiny

from unbraid.core.lora import Lora
from unbraid.files.checkpoint_file import opened_checkpoint
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.places import modules

TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def family(tiny: Tiny) -> Family:
    return "sdxl" if "xl" in tiny.file.parent.name or "tiny_v" in tiny.file.parent.name else "sd15"


def layers(tiny: Tiny) -> dict[str, tuple[int, ...]]:
    """Every layer and its shape."""
    with opened_checkpoint(tiny.file) as file:
        return {name: tuple(file.module_weight(name).shape) for name in modules(file.layout)}


def random_lora(
    shapes: dict[str, tuple[int, ...]], rank: int = 2, seed: int = 0, size: float = 0.05
) -> dict[str, Lora]:
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name, (d, *rest) in shapes.items():
        ones = [1] * (len(rest) - 1)
        down = torch.randn(rank, *rest, generator=rng) * size
        out[name] = Lora(down, torch.randn(d, rank, *ones, generator=rng) * size, 1.5)
    return out
