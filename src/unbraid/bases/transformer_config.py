"""The configurations of a transformer and of what is beside it in a single file, derived from the shapes in its header.

What shapes do not show is taken from the stock models: how a head is divided among the axes of the rotary embedding, the
autoencoder's scaling and shift, the schedule.
"""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from unbraid.bases.checkpoint_config import Config
from unbraid.bases.families import FAMILIES
from unbraid.bases.families.family import Family
from unbraid.bases.sniff import DAMAGED
from unbraid.bases.transformer_file import TITLES, TransformerFile
from unbraid.common.errors import UsageError
from unbraid.files.formats.header import Shape

PATCH = 2
HEAD = 64  # channels of a head in SD3, whose first version has no norm that would show it
LENGTHS = [1024, 512, 512]  # of Z-Image's rotary embedding
FACTOR = 8  # sides of pictures in those of latents
Shapes = Mapping[str, Shape]


def family_of_file(file: TransformerFile) -> Family:
    """The family of a single file."""
    return next(family for family in FAMILIES if family.name == file.kind)


def transformer_config(file: TransformerFile) -> Config:
    """The transformer's configuration. Raises UsageError unless the file has every weight in the shape that follows from
    it, and no others."""
    shapes = file.shapes
    makers = {"flux": _flux, "sd3": _sd3, "z-image": _z_image}
    sized = {"sample_size": file.side // FACTOR} if file.kind == "sd3" else {}
    try:
        config = makers[file.kind](shapes) | sized
        model: Any = family_of_file(file).network.empty(config)
    except KeyError as error:
        raise UsageError(f"it lacks {error.args[0]}", file.path, "Get the full file.") from error
    except (IndexError, ValueError, AssertionError, ZeroDivisionError) as error:
        what = f"{TITLES[file.kind]}: its tensors have shapes that do not fit together"
        raise UsageError(what, file.path, DAMAGED) from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) == shapes.get(name):
            continue
        there = "is not there" if name not in shapes else f"is {shapes[name]}, not {wanted.get(name, 'known')}"
        raise UsageError(f"{TITLES[file.kind]}: {name} {there}", file.path, DAMAGED)
    return config


def _flux(shapes: Shapes) -> Config:
    inner, channels = shapes["x_embedder.weight"]
    (head,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    first = head // 8
    return {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": [first, (head - first) // 2, (head - first) // 2],  # 16, 56, 56
    }


def _sd3(shapes: Shapes) -> Config:
    inner, channels, patch, _ = shapes["pos_embed.proj.weight"]
    norm = shapes.get("transformer_blocks.0.attn.norm_q.weight")
    head = norm[0] if norm else HEAD
    layers = range(_count(shapes, "transformer_blocks"))
    return {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": len(layers),
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": [i for i in layers if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes],
        "qk_norm": "rms_norm" if norm else None,
    }


def _z_image(shapes: Shapes) -> Config:
    rows, inner = shapes["layers.0.attention.to_k.weight"]
    (head,) = shapes["layers.0.attention.norm_q.weight"]
    first = head // 4
    return {
        "_class_name": "ZImageTransformer2DModel",
        "in_channels": shapes["all_x_embedder.2-1.weight"][1] // PATCH**2,
        "dim": inner,
        "n_layers": _count(shapes, "layers"),
        "n_refiner_layers": _count(shapes, "noise_refiner"),
        "n_heads": inner // head,
        "n_kv_heads": rows // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "axes_dims": [first, (head - first) // 2, (head - first) // 2],  # 32, 48, 48
        "axes_lens": LENGTHS,
    }


def _count(shapes: Shapes, stem: str) -> int:
    """The number of blocks whose names begin with `stem`."""
    return len({found[1] for name in shapes if (found := re.match(rf"{stem}\.(\d+)\.", name))})
