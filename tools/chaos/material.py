"""What the cases work on: a tiny random base, pictures, and LoRAs and modules that were trained on them."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageOps
from transformers import CLIPTextConfig, CLIPTextModel

from unbraid.bases.clip_tokenizer import END, SIZE, clip_tokenizer
from unbraid.bases.pipeline import quiet
from unbraid.methods.entry import ROLES
from unbraid.runs import shortest
from unbraid.runs.run import run

SIDE = 32  # pixels of the pictures


def tiny_base(out: Path) -> Path:
    """Save an SD1.5 of two levels with random weights, and return its folder."""
    torch.manual_seed(0)
    text: dict[str, Any] = {"vocab_size": SIZE, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 32}
    text |= {"intermediate_size": 32, "projection_dim": 32, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=16,
    )
    levels: dict[str, Any] = {"block_out_channels": (16, 16, 16), "layers_per_block": 1, "norm_num_groups": 8}
    levels |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    parts: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        StableDiffusionPipeline(
            unet=unet,
            vae=AutoencoderKL(sample_size=SIDE, **levels),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            tokenizer=clip_tokenizer(END),
            scheduler=scheduler,
            requires_safety_checker=False,
            **parts,
        ).save_pretrained(out)
    return out


def material(base: Path, out: Path) -> shortest.Material:
    """Pictures for every verb, and the LoRAs and modules that some verbs start from, trained in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    before, after, partners = out / "cat.png", out / "after.png", dict[str, Path]()
    image = Image.new("RGB", (SIDE + 16, SIDE + 16), "white")
    ImageDraw.Draw(image).ellipse((8, 8, SIDE, SIDE), "orange", "black", 2)
    image.save(before)
    ImageOps.invert(image).save(after)
    for kind, words in (("content", "a teapot in red style"), ("style", "a teapot")):
        partners[kind] = out / "partners" / kind
        partners[kind].mkdir(parents=True, exist_ok=True)
        ImageOps.mirror(image).save(partners[kind] / "a.png")
        (partners[kind] / "a.txt").write_text(words)
    found = shortest.Material(before, after, partners)
    for method in (shortest.FIRST, "break"):
        for job in shortest.jobs(method, found, out / "made", base=str(base), previews=0):
            if not job.out.exists():
                list(run(job, device="cpu"))
    loras = {role: out / "made" / shortest.FIRST / f"{role}.safetensors" for role in ROLES}
    modules = {role: out / "made" / f"break-{role}" / "module.safetensors" for role in ROLES}
    return replace(found, loras=loras, modules=modules)
