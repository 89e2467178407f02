"""CSD, Contrastive Style Descriptors (arXiv 2404.01292), loaded from its authors' checkpoints: a CLIP vision tower with OpenAI's names
(`backbone.*`) and a projection for style, `last_layer_style` [width, dim]. The content projection is not used."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from unbraid.common.errors import UsageError

STYLE = "last_layer_style"
HEAD = 64  # channels of an attention head: OpenAI's vision towers have width / 64 heads
OUTSIDE = {  # OpenAI → transformers
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


def _bare(key: str) -> str:
    """A key without the prefix `module.`, which parallel training adds to every name."""
    return key.removeprefix("module.")


def is_csd(tensors: Mapping[str, Tensor]) -> bool:
    return any(_bare(key) == STYLE for key in tensors)


def build(
    tensors: Mapping[str, Tensor], where: Path, device: torch.device
) -> tuple[CLIPVisionModelWithProjection, Callable[[Sequence[Image.Image]], Tensor]]:
    """The model as transformers' class, whose `image_embeds` are the style vectors, and CLIP's preprocessing for it.

    All sizes are derived from the tensors. Raises UsageError if tensors are missing or do not fit."""
    fix = "Give CSD's own weights, such as yuxi-liu-wired/CSD."
    bare = {_bare(key): tensor.float() for key, tensor in tensors.items()}
    own = {key.removeprefix("backbone."): tensor for key, tensor in bare.items() if key.startswith("backbone.")}
    try:
        patches, (width, dim) = own["conv1.weight"], bare[STYLE].shape
        side = patches.shape[-1] * round((len(own["positional_embedding"]) - 1) ** 0.5)
        blocks = {int(match[1]) for key in own if (match := BLOCK.fullmatch(key))}
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=len(own["transformer.resblocks.0.mlp.c_fc.weight"]),
            projection_dim=dim,
            num_hidden_layers=len(blocks),
            num_attention_heads=max(1, width // HEAD),
            image_size=side,
            patch_size=patches.shape[-1],
            hidden_act="quick_gelu",
        )
        model = CLIPVisionModelWithProjection(config)
        state = {f"vision_model.{key}": t for name, tensor in own.items() for key, t in renamed(name, tensor)}
        model.load_state_dict({**state, "visual_projection.weight": bare[STYLE].T.contiguous()})
    except KeyError as error:
        raise UsageError(f"the CSD checkpoint lacks {error}", where, fix) from error
    except (RuntimeError, ValueError) as error:  # load_state_dict raises RuntimeError for other keys or shapes
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(f"the CSD checkpoint does not fit CLIP's vision tower: {reason}", where, fix) from error
    model.eval().requires_grad_(False).to(device)  # type: ignore[arg-type]
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return model, lambda images: processor(list(images), return_tensors="pt")["pixel_values"]


def renamed(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor of OpenAI's vision tower under transformers' names. The joint matrix of q, k and v becomes three tensors."""
    if match := BLOCK.fullmatch(name):
        number, inner = match.groups()
        start = f"encoder.layers.{number}."
        if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = inner.rpartition("_")[2]
            return [(f"{start}self_attn.{p}_proj.{kind}", part) for p, part in zip("qkv", tensor.chunk(3), strict=True)]
        stem, _, kind = inner.rpartition(".")
        return [(f"{start}{INSIDE[stem]}.{kind}", tensor)]
    if name in OUTSIDE:
        return [(OUTSIDE[name], tensor)]
    stem, _, kind = name.rpartition(".")
    return [(f"{OUTSIDE[stem]}.{kind}", tensor)]
