"""Stable Diffusion 1.x and 2.x."""

from typing import Any

from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from unbraid.bases.families.family import Family
from unbraid.bases.families.unet import UNet, encode_text
from unbraid.core.selectors import USUAL


def lora_metadata(pipe: Any) -> dict[str, str]:
    """SD2.x has the module names of SD1.5, but linear projections. So the metadata has to say that a LoRA is for SD2.x."""
    if not pipe.unet.config["use_linear_projection"]:
        return {}
    v = pipe.scheduler.config["prediction_type"] == "v_prediction"
    architecture = f"stable-diffusion-v2-{'768-v' if v else '512'}/lora"
    version = f"sd_v2{'_v' if v else ''}"
    return {"ss_v2": "True", "ss_base_model_version": version, "modelspec.architecture": architecture}


FAMILY = Family(
    "sd15",
    StableDiffusionPipeline,
    lambda config: not config.get("addition_embed_type"),
    UNet(),
    {
        **USUAL["sd15"],
        "content alone": ("up_blocks.1.attentions.0",),
        "style alone": ("up_blocks.1.attentions.1",),
        "coarse": ("down_blocks.2", "mid_block", "up_blocks.1"),
    },
    encode_text,
    lambda prompts, sizes, dtype: {"added_cond_kwargs": None},
    lora_metadata,
)
