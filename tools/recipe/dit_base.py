"""`icons-dit` as a diffusers folder: written from a checkpoint, looked at, and measured by the judge."""

import json
import shutil
from math import isnan
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from tools.recipe import config, dit, model, parallel, sheet, words
from unbraid.bases.words import FILE as WORDS
from unbraid.bench.truth.subjects import STYLE_WORDS, TRAIN_SETS
from unbraid.common.atomic import atomic

SETTINGS = Path(__file__).with_name("dit.toml")
SUBJECTS = ("panda", "teapot", "dog", "castle", "strawberry", "umbrella", "bus", "shark", "crown", "laptop")
MISSING = {"text_encoder_3": None, "tokenizer_3": None}  # T5: diffusers wants to be told when it loads the folder,
NO_T5: dict[str, Any] = {"max_sequence_length": 0}  # and when it draws; else it adds 256 tokens of zeros
PROBES = (0.9, 0.7, 0.5)  # noise levels of the subject gain


def save(state: Path, base: Path, out: Path, sizes: config.DitSizes = config.DIT) -> int:
    """Write the fp16 folder from the averaged weights of the checkpoint in `state`, with the other parts of `base`. Returns how
    many images it has seen."""
    transformer, images = parallel.smoothed(dit.build(sizes), state / dit.FILE)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    first, second = dit.encoders(base)
    autoencoder: AutoencoderKL = AutoencoderKL.from_pretrained(base / "vae")
    autoencoder.register_to_config(shift_factor=0.0)  # SD3's pipeline wants a number
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),  # the latents are small
        vae=autoencoder,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        **MISSING,  # type: ignore[arg-type]
    )
    model.save(pipe, out)
    words.write(words.eighty(), out)
    shutil.copy(SETTINGS, out / "unbraid.toml")
    (out / "images.json").write_text(json.dumps({"images": images}) + "\n")
    return images


def saved(base: Path) -> StableDiffusion3Pipeline:
    """The pipeline of a diffusers folder, in fp32."""
    return StableDiffusion3Pipeline.from_pretrained(base, torch_dtype=torch.float32, **MISSING)


def sheet_of(base: Path) -> Image.Image:
    return sheet.grid(saved(base), SUBJECTS, **NO_T5)


@torch.no_grad()
def subject_gain(base: Path, source: dit.Tables, subjects: tuple[str, ...]) -> dict[float, float]:
    """(loss with a wrong subject in the caption - loss with the right one) / right, per noise level, on 48 plain pictures."""
    rng, n = torch.Generator().manual_seed(0), 48
    pipe: Any = saved(base)
    subject = torch.randint(len(subjects), (n,), generator=rng)
    style = torch.randint(len(TRAIN_SETS), (n,), generator=rng)
    clean = source.pictures.latents[subject, style, 0].float()
    noise = torch.randn(clean.shape, generator=rng)

    def encoded(shift: int) -> tuple[Tensor, Tensor]:
        pairs = zip(subject.tolist(), style.tolist(), strict=True)
        lines = [f"a {subjects[(s + shift) % len(subjects)]} in {STYLE_WORDS[TRAIN_SETS[k]]} style" for s, k in pairs]
        texts, _, pooled, _ = pipe.encode_prompt(lines, None, None, do_classifier_free_guidance=False, **NO_T5)
        assert texts is not None and pooled is not None
        return texts, pooled

    right, wrong = encoded(0), encoded(1)
    gains = {}
    for sigma in PROBES:
        at = torch.full((n,), sigma)
        first, second = (
            dit.flow_loss(pipe.transformer, dit.Batch(clean, noise, at, *texts)).item() for texts in (right, wrong)
        )
        gains[sigma] = (second - first) / first
    return gains


def write(figures: dict[str, float], prompts: int, base: Path) -> None:
    """README.md of the folder, and the same figures as figures.json. `prompts`: how many were drawn."""
    images = json.loads((base / "images.json").read_text())["images"]
    known = json.loads((base / WORDS).read_text())

    def row(name: str, content: str, style: str) -> str:
        values = [figures[f"{kind} {key}"] for kind in ("drawn", "real") for key in (content, style)]
        return f"| {name} | " + " | ".join("–" if isnan(value) else f"{value:.0%}" for value in values) + " |"

    text = CARD.format(
        rows="\n".join(row(part, f"content {part}", f"style {part}") for part in ("all", "art", "filter")),
        by_style="\n".join(row(word, f"content in {word}", f"style {word}") for word in words.STYLES),
        count=len(known["subjects"]),
        styles=", ".join(known["styles"]),
        images=images,
        prompts=prompts,
        parameters=sum(value.numel() for value in _weights(base).values()) / 1e6,
    )
    with atomic(base / "README.md") as part:
        part.write_text(text)
    with atomic(base / "figures.json") as part:
        part.write_text(json.dumps({"prompts": prompts, **figures}, indent=2) + "\n")


def _weights(base: Path) -> dict[str, Tensor]:
    return load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")


CARD = """# `icons-dit`: a small transformer with joint attention

SD3's architecture in miniature (qk-norm as in 3.5, one attention per block, no T5), {parameters:.1f} M parameters, flow matching,
on the latents, the autoencoder, the text encoders and the tokenizer of unbraid's embedded base `icons`. It exists so that
choices about such bases can be measured on a CPU. `unbraid generate --base FOLDER` draws with it. So does
`StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None)`, called with `max_sequence_length=0`.

![Ten subjects in six styles](sheet.webp)

**Prompts** such as `a panda in flat style`. Styles: {styles}. It was trained on {images:,} images of {count} subjects;
`words.json` lists them.

## Figures

Read off by the judge (docs/judge.md) from {prompts} drawings, 25 steps, guidance 4; beside them the real icons, as the ceiling. Top-1: is the
nearest of the {count} subjects the one asked for, and the nearest of the 14 styles?

| | content | style | real icons: content | real icons: style |
|---|---|---|---|---|
{rows}

By style:

| | content | style | real icons: content | real icons: style |
|---|---|---|---|---|
{by_style}

Made again by `python -m tools.recipe dit --work DIR`, `dit-save` and `dit-card`. The weights are Apache-2.0; art, authors and
licences as for `icons`.
"""
