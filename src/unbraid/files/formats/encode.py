"""A LoRA as keys, tensors and metadata, ready to be saved in kohya's or diffusers' dialect."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import rescaled
from unbraid.files.formats.blocks import Family, to_ldm
from unbraid.files.formats.families import DESIGNS
from unbraid.files.formats.metadata import kohya_metadata, labelled, peft_metadata
from unbraid.files.formats.recognise import name_in, template_of
from unbraid.files.formats.widths import other_base

Dialect = Literal["kohya", "diffusers"]
_CLIPS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}
_FLUX_TEXT = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"}
_ONE = {"text_encoder": "lora_te"}
KOHYA_TEXT: dict[Family, dict[str, str]] = {
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": _CLIPS,
    "flux": _FLUX_TEXT,
    "chroma": _FLUX_TEXT,
    "sd15": _ONE,
    "sd21": _ONE,
    "unknown": _CLIPS,
}
DEFAULT: dict[Family, Dialect] = {
    "sdxl": "kohya",
    "sd15": "kohya",
    "sd21": "kohya",
}  # what most tools of the family read


def dialect_for(modules: Iterable[str], family: Family) -> Dialect:
    """The default dialect: kohya for UNets, diffusers for transformers. For names that are in no table, the dialect that they look like."""
    modules = tuple(modules)
    kept = [name for name in modules if name_in(name, family) != name]
    if kept:
        return "diffusers" if "." in kept[0] else "kohya"
    return DEFAULT.get(family) or ("diffusers" if any(name.startswith("transformer.") for name in modules) else "kohya")


def encode(
    modules: Mapping[str, Lora],
    family: Family,
    dialect: Dialect,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by key, and the metadata. kohya: one alpha for the whole file. diffusers: alpha = r for every module and the remaining
    scale in `lora_B`, so that tools which ignore the settings compute the same."""
    common = _common_alpha(modules)
    if not 1e-30 < abs(common) < 1e15:
        size = "large" if abs(common) > 1 else "small"
        raise UsageError(f"the strength is so {size} that no tool can use it", "alpha", "Give another one.")
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
            if "." not in name:
                raise UsageError(
                    "diffusers' name for this module is not known", name, "Leave --to out: names stay as they are."
                )
            tensors |= {f"{name}.lora_A.weight": lora.down, f"{name}.lora_B.weight": lora.up}
    shapes = {name: tuple(lora.down.shape) for name, lora in modules.items()}
    strings = labelled(metadata, family, bool(other_base(family, shapes)))
    if dialect == "kohya":
        return _apart(tensors), kohya_metadata(strings, ranks, common)
    return _apart(tensors), peft_metadata(strings, ranks)


def vector_tensors(
    vectors: Mapping[str, Tensor], family: Family, dialect: Dialect, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Changes of biases and norms (MODULE.diff_b, .w_norm, .b_norm) under LyCORIS's names. UsageError for diffusers' dialect, which has no
    names for them."""
    if vectors and dialect == "diffusers":
        what = f"{len(vectors)} changes of biases and norms have no place in diffusers' files"
        raise UsageError(what, next(iter(vectors)), "Write it with --to kohya, or bake it into a checkpoint.")
    out = {}
    for name, tensor in vectors.items():
        module, _, part = name.rpartition(".")
        fit = template_of(module, family) if family in DESIGNS and DESIGNS[family].kohya == "original" else None
        if fit and module.startswith("transformer.") and fit.template not in DESIGNS[family].original:
            what = f"kohya's files of {family} have other layers than this one: its {part} has no place in them"
            raise UsageError(what, module, "Bring it in kohya's names, or train it without biases and norms.")
        out[f"{kohya_name(module, family)}.{part}"] = (tensor if dtype is None else tensor.to(dtype)).contiguous()
    return out


def kohya_name(module: str, family: Family) -> str:
    """`unet.down_blocks.1.attentions.0.proj_in` → `lora_unet_input_blocks_4_1_proj_in` (SDXL: LDM names)."""
    if "." not in module:
        return module  # a name that is in no table stays as it was read
    component, _, path = module.partition(".")
    known = name_in(module, family) == module
    if component == "unet" and known:
        ldm = to_ldm(path) if family == "sdxl" else path
        if ldm is None:
            raise UsageError("the module has no place in SDXL's block table", module, "Write it with --to diffusers.")
        return "lora_unet_" + ldm.replace(".", "_")
    if component == "transformer" and known and DESIGNS[family].kohya:
        return f"lora_unet_{path.replace('.', '_')}"
    prefix = KOHYA_TEXT.get(family, {}).get(component)
    if prefix is None or not known:
        raise UsageError(
            f"kohya's name for this module of {family} is not known", module, "Write it with --to diffusers."
        )
    return f"{prefix}_{path.replace('.', '_')}"


def _common_alpha(modules: Mapping[str, Lora]) -> float:
    """The alpha of the file: the most common one that is not zero."""
    counts = Counter(lora.alpha for lora in modules.values() if lora.alpha)
    return counts.most_common(1)[0][0] if counts else 1.0


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clone tensors that share memory, which safetensors refuses to save."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        where = tensor.data_ptr()
        if where in seen:
            tensors[key] = tensor.clone()
        seen.add(where)
    return tensors
