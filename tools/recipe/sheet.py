"""Looking at the base while it trains: a sheet of samples and the subject gain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tools.recipe import latents, model, unet, vae
from tools.recipe.config import SIZES

SUBJECTS = (
    "panda",
    "teapot",
    "rocket",
    "dog face",
    "hot dog",
    "castle",
    "sailboat",
    "strawberry",
    "grinning face",
    "tulip",
)
STYLES = ("cartoon", "flat", "glossy", "minimal", "blueprint", "noir")
STEPS, GUIDANCE = 25, 4.0
SIZE = SIZES.pixels


def load(work: Path) -> StableDiffusionXLPipeline:
    """The pipeline of the latest checkpoints in `work`, in fp32."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    net, _ = unet.ema_net(tokenizer, work)
    autoencoder = vae.load(work)
    autoencoder.register_to_config(scaling_factor=load_file(work / latents.FILE)["scale"].item())
    return model.pipeline(net.unet, (net.text, net.text_2), autoencoder, tokenizer)


def saved(base: Path) -> StableDiffusionXLPipeline:
    """The pipeline of a diffusers folder, in fp32."""
    return StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float32)


def draw(work: Path, trained: tuple[str, ...], out: Path) -> None:
    torch.set_num_threads(1)
    pipe = load(work)
    grid(pipe).save(out)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    net, images = unet.ema_net(tokenizer, work)
    table = load_file(work / latents.FILE)["latents"]
    gains = unet.subject_gain(net, table, trained, tokenizer)
    print(f"{images} images: subject gain", {t: f"{gain:.1%}" for t, gain in gains.items()})


def grid(pipe: Any, subjects: Sequence[str] = SUBJECTS, **more: Any) -> Image.Image:
    """One picture of each subject (rows) in each of STYLES (columns), always from the same noise. `more`: arguments of a stock
    pipeline other than SDXL's."""
    pipe.set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (SIZE * len(STYLES), SIZE * len(subjects)))
    for row, name in enumerate(subjects):
        prompts = [f"a {name} in {style} style" for style in STYLES]
        done = pipe(
            prompts,
            negative_prompt=[""] * len(prompts),
            generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            height=SIZE,
            width=SIZE,
            **more,
        )
        for column, picture in enumerate(done.images):
            sheet.paste(picture, (column * SIZE, row * SIZE))
    return sheet
