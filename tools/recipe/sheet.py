"""Looking at the base while it trains: a sheet of samples and the subject gain."""

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tools.recipe import model, unet, vae
from tools.recipe.config import PRESETS
from unbraid.bench.truth import subjects

STYLES = ("cartoon", "flat", "glossy", "minimal", "sepia", "night", "blueprint", "comic", "neon", "pixel")


def load(work: Path, preset: str) -> StableDiffusionXLPipeline:
    """The pipeline of the latest checkpoints in `work`, in fp32."""
    config = PRESETS[preset]
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    net, _ = unet.ema_net(config, tokenizer, work)
    autoencoder = vae.load(config, work)
    (cache,) = list(work.glob("latents.*.safetensors"))[:1]
    autoencoder.register_to_config(scaling_factor=load_file(cache)["scale"].item())
    return model.pipeline(net.unet, (net.text, net.text_2), autoencoder, tokenizer)


def seen(work: Path, preset: str) -> int:
    """How many images the latest checkpoint has seen."""
    return unet.ema_net(PRESETS[preset], CLIPTokenizer.from_pretrained(work / "tokenizer"), work)[1]


def draw(work: Path, preset: str, out: Path, count: int = 6) -> None:
    config = PRESETS[preset]
    torch.set_num_threads(1)
    pipe = load(work, preset)
    pipe.set_progress_bar_config(disable=True)
    names = subjects.trained((), config.unet.subjects)
    rows = []
    for name in names[:: len(names) // count][:count]:
        prompts = [f"a {name} in {style} style" for style in STYLES]
        rng = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        size = config.size
        done = pipe(
            prompts,
            negative_prompt=[""] * len(prompts),
            generator=rng,
            num_inference_steps=15,
            guidance_scale=3.0,
            height=size,
            width=size,
        )
        row = Image.new("RGB", (size * len(prompts), size))
        for i, picture in enumerate(done.images):  # type: ignore[union-attr]
            row.paste(picture, (i * size, 0))
        rows.append(row)
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * row.height))
    sheet.save(out)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    net, images = unet.ema_net(config, tokenizer, work)
    (cache,) = list(work.glob("latents.*.safetensors"))[:1]
    gains = unet.subject_gain(net, unet.Data(load_file(cache)["latents"], names, config.size), tokenizer)
    print(f"{images} images: subject gain", {t: f"{gain:.1%}" for t, gain in gains.items()})
