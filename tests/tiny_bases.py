"""Tiny random bases with the proportions of the real ones (four-level VAE, CLIP's own vocabulary, 64-channel heads), as folder
and file."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from ldm import save_single_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from unbraid.bases.base import Base
from unbraid.bases.clip_tokenizer import END, SIZE, clip_tokenizer
from unbraid.bases.families.noising import Diffusion

SIDE = 64  # pixels
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Tiny:
    """The same base as a folder and as a file."""

    folder: Path
    file: Path


def save_both(pipe: Any, out: Path, **marks: str) -> Tiny:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(out / "folder")
    return Tiny(out / "folder", save_single_file(pipe, out / "file.safetensors", size=SIDE, **marks))


def sdxl(v: bool = False) -> StableDiffusionXLPipeline:
    """An SDXL that predicts epsilon, with SDXL's own sampler, or v, with zero terminal SNR."""
    torch.manual_seed(0)
    sampler: Any = EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1)
    if v:
        more = {
            "clip_sample": False,
            "set_alpha_to_one": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
        }
        sampler = DDIMScheduler(**NOISE, timestep_spacing="trailing", **more)
    return StableDiffusionXLPipeline(
        unet=unet(
            ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            transformer_layers_per_block=(1, 1, 1),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 64,
            use_linear_projection=True,
            cross_attention_dim=96,
        ),
        text_encoder=CLIPTextModel(text(32, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text(64, "gelu")),
        tokenizer=clip_tokenizer(END),
        tokenizer_2=clip_tokenizer("!"),
        vae=vae(0.13025),
        scheduler=sampler,
        add_watermarker=False,
    )


def sd15() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    levels = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    return sd(unet(levels, cross_attention_dim=32), "quick_gelu", END, {})


def sd21() -> StableDiffusionPipeline:
    """An SD2.1: v-prediction, linear projections, OpenCLIP's text encoder."""
    torch.manual_seed(0)
    levels = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    model = unet(levels, cross_attention_dim=64, use_linear_projection=True, upcast_attention=True)
    return sd(model, "gelu", "!", {"prediction_type": "v_prediction"})


def sd(model: UNet2DConditionModel, act: str, pad: str, more_config: dict[str, Any]) -> StableDiffusionPipeline:
    more = {
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        **more_config,
    }
    parts: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    return StableDiffusionPipeline(
        unet=model,
        vae=vae(0.18215),
        text_encoder=CLIPTextModel(text(model.config["cross_attention_dim"], act)),
        tokenizer=clip_tokenizer(pad),
        scheduler=DDIMScheduler(**NOISE, **more),  # type: ignore[arg-type]
        requires_safety_checker=False,
        **parts,
    )


def unet(levels: tuple[str, ...], **more: Any) -> UNet2DConditionModel:
    channels = (32, 64, 64, 64)[: len(levels)]
    settings: dict[str, Any] = {
        "sample_size": SIDE // 8,
        "down_block_types": levels,
        "up_block_types": tuple(reversed([name.replace("Down", "Up") for name in levels])),
        "block_out_channels": channels,
        "attention_head_dim": [1] * len(levels) if more.get("use_linear_projection") else 8,
        **more,
    }
    return UNet2DConditionModel(**settings)


def vae(scaling: float) -> AutoencoderKL:
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "sample_size": SIDE,
        "scaling_factor": scaling,
    }
    return AutoencoderKL(**settings)


def text(width: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        hidden_act=act,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def diffusion(base: Base) -> Diffusion:
    """The noise process of a base that is no base with flow matching."""
    assert isinstance(base.process, Diffusion)
    return base.process
