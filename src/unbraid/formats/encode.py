"""A LoRA as keys, tensors and metadata, ready to be saved: kohya's dialect or diffusers'."""

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from unbraid.errors import UsageError
from unbraid.formats.blocks import Family, to_ldm
from unbraid.formats.metadata import kohya_metadata, peft_metadata
from unbraid.lora import Lora
from unbraid.lowrank import rescaled

Dialect = Literal["kohya", "diffusers"]
KOHYA_TEXT = {
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"},
    "flux": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
    "sd15": {"text_encoder": "lora_te"},
    "unknown": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"},
}


def encode(
    modules: Mapping[str, Lora],
    family: Family,
    dialect: Dialect,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by key, and the metadata. kohya: one alpha for the whole file. diffusers: alpha = r everywhere,
    the rest folded into `lora_B`, so that tools which do not read the settings load it right too."""
    common = _common_alpha(modules)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, lora in modules.items():
        ranks[name] = rank = len(lora.down)
        alpha = common if dialect == "kohya" else float(rank)
        lora = rescaled(lora, alpha, dtype, name)
        if dialect == "kohya":
            key = kohya_name(name, family)
            tensors |= {f"{key}.lora_down.weight": lora.down, f"{key}.lora_up.weight": lora.up}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)  # 0-d: loaders call .item()
        else:
            tensors |= {f"{name}.lora_A.weight": lora.down, f"{name}.lora_B.weight": lora.up}
    if dialect == "kohya":
        return _apart(tensors), kohya_metadata(metadata, family, ranks, common)
    return _apart(tensors), peft_metadata(metadata, family, ranks)


def vector_tensors(
    vectors: Mapping[str, Tensor], family: Family, dialect: Dialect, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """What no LoRA can hold, MODULE.diff_b, .w_norm or .b_norm, in LyCORIS's names; diffusers' files have no place for it."""
    if vectors and dialect == "diffusers":
        what = f"{len(vectors)} changes of biases and norms have no place in diffusers' files"
        raise UsageError(what, next(iter(vectors)), "Write it with --to kohya, or bake it into a checkpoint.")
    out = {}
    for name, tensor in vectors.items():
        module, _, part = name.rpartition(".")
        out[f"{kohya_name(module, family)}.{part}"] = (tensor if dtype is None else tensor.to(dtype)).contiguous()
    return out


def kohya_name(module: str, family: Family) -> str:
    """`unet.down_blocks.1.attentions.0.proj_in` → `lora_unet_input_blocks_4_1_proj_in` (SDXL: LDM names)."""
    component, _, path = module.partition(".")
    if component == "unet":
        ldm = to_ldm(path) if family == "sdxl" else path
        if ldm is None:
            raise UsageError("the module has no place in SDXL's block table", module, "Write it with --to diffusers.")
        return "lora_unet_" + ldm.replace(".", "_")
    prefix = "lora_unet" if component == "transformer" else KOHYA_TEXT[family].get(component)
    if prefix is None:
        raise UsageError(f"kohya files have no {component} for {family}", module, "Write it with --to diffusers.")
    return f"{prefix}_{path.replace('.', '_')}"


def _common_alpha(modules: Mapping[str, Lora]) -> float:
    """The file's one alpha: the most common one that is not zero."""
    counts = Counter(lora.alpha for lora in modules.values() if lora.alpha)
    return counts.most_common(1)[0][0] if counts else 1.0


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory are cloned: a file cannot share."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        where = tensor.data_ptr()
        if where in seen:
            tensors[key] = tensor.clone()
        seen.add(where)
    return tensors
