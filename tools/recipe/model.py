"""SDXL's architecture in miniature, and the diffusers folder it is saved as."""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools.recipe.config import SIZE_IDS, TOKENS, Sizes


def build_unet(sizes: Sizes) -> UNet2DConditionModel:
    channels, width = sizes.unet, 2 * sizes.text
    settings: dict[str, Any] = {  # diffusers' annotations allow less than it does
        "in_channels": sizes.latent,
        "out_channels": sizes.latent,
        "sample_size": sizes.pixels // 2 ** (len(sizes.vae) - 1),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": channels,
        "layers_per_block": 2,
        "transformer_layers_per_block": sizes.depth,
        "attention_head_dim": tuple(max(1, c // sizes.head) for c in channels),  # SDXL's name for the head count
        "cross_attention_dim": width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_IDS,
        "projection_class_embeddings_input_dim": 6 * SIZE_IDS + width,
        "norm_num_groups": 16,
    }
    return UNet2DConditionModel(**settings)


def build_text_encoders(sizes: Sizes, tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Two small CLIP text models. At the start the second one's pooled output is nearly the mean of its
    tokens, so that a subject reaches the time embedding within the first minutes of training."""
    width = sizes.text
    settings = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=TOKENS,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    first, second = CLIPTextModel(settings), CLIPTextModelWithProjection(settings)
    for encoder in (first, second):
        for name, module in encoder.named_modules():
            if name.endswith("token_embedding"):
                nn.init.normal_(module.weight, std=0.5)  # type: ignore[arg-type]
            elif name.endswith(("v_proj", "out_proj")):
                nn.init.eye_(module.weight)  # type: ignore[arg-type]
    return first, second


def scheduler() -> DDIMScheduler:
    """SDXL's betas, v-prediction, zero terminal SNR (arXiv 2305.08891): white backgrounds come out white."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def pipeline(
    unet: UNet2DConditionModel,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler(),  # type: ignore[arg-type]
        force_zeros_for_empty_prompt=False,  # trained on empty captions, not on zeroed embeddings
        add_watermarker=False,
    )


def save(pipe: DiffusionPipeline, out: Path) -> None:
    """Write the fp16 diffusers folder, keeping the documents that stand in it."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(part, safe_serialization=True)
    out.mkdir(parents=True, exist_ok=True)
    for entry in part.iterdir():
        target = out / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.rename(target)
    part.rmdir()
