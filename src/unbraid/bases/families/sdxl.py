"""Stable Diffusion XL, and models of the same design such as Pony, Illustrious and the embedded base."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor

from unbraid.bases.families.family import Family, Prompt
from unbraid.bases.families.unet import UNet, encode_text
from unbraid.core.selectors import TABLES, USUAL


def conditions(prompts: Sequence[Prompt], sizes: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The pooled vectors of the texts, `[b, channels]`, and six numbers about the size of each picture, `[b, 6]`."""
    pooled = torch.stack([prompt.pooled for prompt in prompts if prompt.pooled is not None])
    return {"added_cond_kwargs": {"text_embeds": pooled.to(dtype), "time_ids": sizes.to(dtype)}}


FAMILY = Family(
    "sdxl",
    StableDiffusionXLPipeline,
    lambda config: bool(config.get("addition_embed_type")),
    UNet(),
    {
        **USUAL["sdxl"],
        "content alone": TABLES["b-lora"].blocks["content"],
        "style alone": TABLES["b-lora"].blocks["style"],
        "coarse": ("down_blocks.2", "mid_block", "up_blocks.0"),
    },
    encode_text,
    conditions,
    lambda pipe: {},
)
