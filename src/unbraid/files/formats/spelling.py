"""How each dialect spells the keys of a LoRA, as one table. The docs and the tests are made from it; encode.py writes files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta
from unbraid.files.formats.blocks import to_ldm

_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@dataclass(frozen=True)
class Spelling:
    """`name`: unbraid's name of a module → the dialect's. `down`, `up`: suffixes. `alpha`: whether files have alphas; if not, the scale is
    in `up`. `only`: regular expression for the modules that such files can hold."""

    name: Callable[[str], str]
    down: str
    up: str
    alpha: bool = False
    only: str = ""


def spelled(modules: Mapping[str, Lora], spelling: Spelling) -> dict[str, Tensor]:
    """The tensors of a LoRA by key, in a dialect."""
    out: dict[str, Tensor] = {}
    for module, one in modules.items():
        scale, name = 1.0 if spelling.alpha else one.alpha / len(one.down), spelling.name(module)
        out |= {f"{name}{spelling.down}": one.down, f"{name}{spelling.up}": one.up * scale}
        if spelling.alpha:
            out[f"{name}.alpha"] = torch.tensor(one.alpha)
    return out


def dense(modules: Mapping[str, Lora]) -> dict[str, Tensor]:
    """ziplora-pytorch's files: the whole change of every module."""
    return {f"{name.replace('unet.', 'unet.unet.')}.lora.weight": delta(one) for name, one in modules.items()}


def kohya(module: str) -> str:
    component, _, path = module.partition(".")
    return _KOHYA[component] + path.replace(".", "_")


def ldm(module: str) -> str:
    component, _, path = module.partition(".")
    path = (to_ldm(path) or "") if component == "unet" else path
    return _KOHYA[component] + path.replace(".", "_")


def _processor(module: str) -> str:
    stem, _, leaf = module.removesuffix(".0").rpartition(".")
    return f"{stem}.processor.{leaf}" if "attn1" in module else module


def _diffusion_model(module: str) -> str:
    return module if module.startswith("text") else f"diffusion_model.{to_ldm(module.removeprefix('unet.'))}"


_DOTS, _AB = (".lora.down.weight", ".lora.up.weight"), (".lora_A.weight", ".lora_B.weight")
_DOWN, _UNDER = (".lora_down.weight", ".lora_up.weight"), ("_lora.down.weight", "_lora.up.weight")
_ATTENTION = r"^unet\..*\.attn[12]\."
DIALECTS: dict[str, Spelling] = {
    "kohya, LDM names": Spelling(ldm, *_DOWN, alpha=True),
    "kohya, diffusers names; OneTrainer": Spelling(kohya, *_DOWN, alpha=True),
    "kohya without alpha": Spelling(kohya, *_DOWN),
    "diffusers, PEFT": Spelling(str, *_AB),
    "PEFT, named adapter": Spelling(str, ".lora_A.default.weight", ".lora_B.default.weight"),
    "PEFT, base_model.model.": Spelling(lambda m: f"base_model.model.{m}", *_AB),
    "lora.down; B-LoRA, PairCustomization": Spelling(str, *_DOTS),
    "unet.unet.; UnZipLoRA, Break-for-Make": Spelling(lambda m: m.replace("unet.", "unet.unet."), *_DOTS),
    "lora_linear_layer": Spelling(str, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "attention processors": Spelling(_processor, *_UNDER, only=_ATTENTION),
    "attention processors, no prefix": Spelling(
        lambda m: _processor(m).removeprefix("unet."), *_UNDER, only=_ATTENTION
    ),
    "diffusers, no text_model": Spelling(lambda m: m.replace("text_model.", ""), *_AB),
    "LyCORIS": Spelling(lambda m: kohya(m).replace("lora_unet_", "lycoris_"), *_DOWN, alpha=True),
    "diffusion_model.": Spelling(_diffusion_model, *_AB, alpha=True),
}
