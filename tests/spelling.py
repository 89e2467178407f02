"""Random LoRAs, and files with them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta

ATTN = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_encoder.text_model.encoder.layers.0"


def lora(
    seed: int, d: int = 6, k: int = 5, rank: int = 3, alpha: float = 2.0, dtype: torch.dtype = torch.float64
) -> Lora:
    rng = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, k, generator=rng, dtype=torch.float64).to(dtype)
    return Lora(down, torch.randn(d, rank, generator=rng, dtype=torch.float64).to(dtype), alpha)


def some(dtype: torch.dtype = torch.float64) -> dict[str, Lora]:
    names = (f"{ATTN}.to_q", f"{ATTN}.to_out.0", "unet.mid_block.attentions.0.proj_in", f"{TEXT}.self_attn.q_proj")
    return {name: lora(i, rank=2 + i % 3, alpha=1.0 + i, dtype=dtype) for i, name in enumerate(names)}


def same(first: dict[str, Lora], second: dict[str, Lora]) -> float:
    """The relative difference of the changes that two LoRAs make; the largest over modules."""
    assert set(first) == set(second)
    return max(
        float((delta(first[n]).double() - delta(second[n]).double()).norm() / delta(first[n]).double().norm())
        for n in first
    )


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path
