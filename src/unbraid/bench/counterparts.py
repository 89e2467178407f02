"""Subjects and styles that the base has never seen, with the true counterpart of each subject in each style: what the studies of
putting LoRAs together have in common."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unbraid import pictures
from unbraid.base import load
from unbraid.bases.recipe.filters import HELD_OUT_FILTERS
from unbraid.bases.recipe.subjects import TRAIN_SETS
from unbraid.bench.art import held_out_art, known_art, to_image
from unbraid.bench.judge import Judge, similarity
from unbraid.combine import Combine
from unbraid.job import RARE, Job
from unbraid.render import Use, render
from unbraid.run import run

GUIDANCE = 4.0
STYLES = {  # word → the picture that it is learnt from, and how true counterparts are made
    "line art": ("cat", "openmoji", None),
    "stencil": ("cat", "fluent-emoji-high-contrast", None),
    "pencil": ("cat", "noto", "pencil"),  # held-out filters
    "emboss": ("cat", "noto", "emboss"),
}


def content_prompt(subject: str) -> str:
    return f"a {RARE} {subject}"


def style_prompt(style: str) -> str:
    return f"a {STYLES[style][0]} in {style} style"


def true(subject: str, style: str) -> Tensor:
    """`[3, h, w]` in 0..1: the subject in the style, as the artist drew it."""
    _, of, look = STYLES[style]
    art = known_art() if subject in known_art().names else held_out_art()
    picture = art.picture(subject, of)
    return HELD_OUT_FILTERS[look](picture[None]).expand(1, 3, -1, -1)[0] if look else picture


def inputs(work: Path, subject: str | None, style: str | None) -> list[Path]:
    """The pictures that a LoRA is learnt from: the subject as four artists drew it, or the style's one picture."""
    if subject:
        images = {of: held_out_art().image(subject, of) for of in TRAIN_SETS}
    else:
        assert style
        images = {STYLES[style][0]: to_image(true(STYLES[style][0], style))}
    files = [work / "inputs" / (subject or str(style)).replace(" ", "-") / f"{name}.png" for name in images]
    for file, image in zip(files, images.values(), strict=True):
        if not file.exists():
            pictures.save_image(image, file)
    return files


def joint_prompt(subject: str, style: str) -> str:
    return f"a {RARE} {subject} in {style} style"


def made(job: Job, file: Path) -> Path:
    if not file.exists():
        for _ in run(job, resume=(job.out / "run.toml").exists()):
            pass
    return file


def draw(prompt: str, uses: tuple[Use, ...], combine: Combine, seed: int) -> Image.Image:
    (image,) = render(base(), prompt, uses, combine=combine, guidance=GUIDANCE, seeds=(seed,))
    return image


@cache
def base() -> Any:
    return load()


def score(judge: Judge, image: Image.Image, truth: Tensor) -> tuple[float, float]:
    """(content, style): cosines of a picture to the true counterpart `[3, h, w]`."""
    array = np.asarray(image.convert("RGB"), np.float32) / 255
    content, style = judge.embed(torch.stack([torch.from_numpy(array).permute(2, 0, 1), truth]))
    return float(similarity(content[:1], content[1:])), float(similarity(style[:1], style[1:]))
