"""Random LoRAs, and how each dialect spells them."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unbraid.formats.blocks import to_ldm
from unbraid.lora import Lora
from unbraid.lowrank import delta

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
    """The largest difference of the changes, relative to the change."""
    assert set(first) == set(second)
    return max(
        float((delta(first[n]).double() - delta(second[n]).double()).norm() / delta(first[n]).double().norm())
        for n in first
    )


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def spelled(modules: dict[str, Lora], name: Callable[[str], str], down: str, up: str, alpha: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for module, one in modules.items():
        scale = 1.0 if alpha else one.alpha / len(one.down)
        out |= {f"{name(module)}{down}": one.down, f"{name(module)}{up}": one.up * scale}
        if alpha:
            out[f"{name(module)}.alpha"] = torch.tensor(one.alpha)
    return out


def kohya(module: str) -> str:
    component, _, path = module.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te1_"}[component] + path.replace(".", "_")


def ldm(module: str) -> str:
    component, _, path = module.partition(".")
    path = (to_ldm(path) or "") if component == "unet" else path
    return {"unet": "lora_unet_", "text_encoder": "lora_te1_"}[component] + path.replace(".", "_")


def processor(module: str) -> str:
    stem, _, leaf = module.removesuffix(".0").rpartition(".")
    return f"{stem}.processor.{leaf}" if "attn1" in module else module


DIALECTS: dict[str, tuple[Callable[[str], str], str, str, bool]] = {
    "kohya ldm": (ldm, ".lora_down.weight", ".lora_up.weight", True),
    "kohya diffusers": (kohya, ".lora_down.weight", ".lora_up.weight", True),
    "no alpha": (kohya, ".lora_down.weight", ".lora_up.weight", False),
    "peft": (str, ".lora_A.weight", ".lora_B.weight", False),
    "named adapter": (str, ".lora_A.default.weight", ".lora_B.default.weight", False),
    "base_model": (lambda m: f"base_model.model.{m}", ".lora_A.weight", ".lora_B.weight", False),
    "lora.down, B-LoRA": (str, ".lora.down.weight", ".lora.up.weight", False),
    "unet.unet., UnZipLoRA and Break-for-Make": (lambda m: m.replace("unet.", "unet.unet."), ".lora.down.weight", ".lora.up.weight", False),
    "linear layer": (str, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", False),
    "attention processors": (processor, "_lora.down.weight", "_lora.up.weight", False),
    "bare processors": (lambda m: processor(m).removeprefix("unet."), "_lora.down.weight", "_lora.up.weight", False),
    "no text_model": (lambda m: m.replace("text_model.", ""), ".lora_A.weight", ".lora_B.weight", False),
    "lycoris": (lambda m: kohya(m).replace("lora_unet_", "lycoris_"), ".lora_down.weight", ".lora_up.weight", True),
    "diffusion_model": (
        lambda m: m if m.startswith("text") else f"diffusion_model.{to_ldm(m.removeprefix('unet.'))}",
        ".lora_A.weight",
        ".lora_B.weight",
        True,
    ),
}  # fmt: skip
