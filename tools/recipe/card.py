"""The last stage: measure the finished base with the judge, and write its model card."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from tools.recipe import vae
from unbraid.bases.base import Base, load
from unbraid.bench.truth import filters, subjects
from unbraid.bench.truth.judge import Judge, load_judge
from unbraid.common.atomic import atomic
from unbraid.sampling.sample import NEGATIVE, classifier_free, generate

PROMPTS = 200
GUIDANCE, STEPS = 4.0, 25
ART = len(subjects.TRAIN_SETS)


def looks(art: np.ndarray) -> Tensor:
    """uint8 `[n, 4, h, w, 3]` to float `[n, 4, 1 + filters, 3, h, w]`: every picture plain and under every filter."""
    x = torch.from_numpy(np.array(art)).permute(0, 1, 4, 2, 3).float() / 255
    flat = x.flatten(0, 1)
    every = [flat, *(f(flat).expand_as(flat) for f in filters.TRAIN_FILTERS.values())]
    return torch.stack(every, 1).unflatten(0, x.shape[:2])


def measure(art: np.ndarray, names: tuple[str, ...], out: Path | None = None) -> dict[str, float]:
    """Judged top-1 of content and style on 200 prompts, and of the real icons beside them.

    `art`: uint8 `[subject, 4, h, w, 3]` of the trained subjects. Half of the prompts are in the four art styles,
    half in filter styles, as in training. Content: the nearest subject, each being the mean of its pictures in the
    art styles other than the one asked for. Style: the nearest style, each being the mean over all other subjects.
    """
    judge, base, rng = load_judge(), load(), random.Random(0)
    content, style = _embed_all(judge, looks(art))
    words = [*(subjects.STYLE_WORDS[name] for name in subjects.TRAIN_SETS), *filters.TRAIN_FILTERS]
    asked = []
    for i in range(PROMPTS):
        look = rng.randrange(ART) if i % 2 == 0 else ART + rng.randrange(len(filters.TRAIN_FILTERS))
        asked.append((rng.randrange(len(names)), look))
    prompts = [f"a {names[subject].replace('-', ' ')} in {words[look]} style" for subject, look in asked]
    drawn = torch.stack([_draw(base, prompt, i, out) for i, prompt in enumerate(track(prompts, "drawing"))])
    real = torch.stack([_real(art, subject, look) for subject, look in asked])
    figures = {}
    for kind, pictures in (("drawn", drawn), ("real", real)):
        c, s = judge.embed(pictures)
        hits = [_hits(c[i], s[i], content, style, *asked[i]) for i in range(PROMPTS)]
        for part, chosen in (("all", hits), ("art", hits[0::2]), ("filter", hits[1::2])):
            figures[f"{kind} content {part}"] = float(np.mean([hit[0] for hit in chosen]))
            figures[f"{kind} style {part}"] = float(np.mean([hit[1] for hit in chosen]))
    return figures


def reconstruction(held_out: np.ndarray) -> dict[str, float]:
    """PSNR in dB of the autoencoder on held-out subjects, uint8 `[n, 6, h, w, 3]`, per set."""
    model = load().vae
    x = torch.from_numpy(np.array(held_out)).permute(0, 1, 4, 2, 3).float() / 255
    return {name: vae.psnr(model, x[:, i]) for i, name in enumerate(subjects.SETS)}


def _draw(base: Base, prompt: str, seed: int, out: Path | None) -> Tensor:
    encoded = {"main": base.encode_prompt(prompt), NEGATIVE: base.encode_negative()}
    (image,) = generate(base, classifier_free(GUIDANCE, "main"), encoded, seeds=(seed,), steps=STEPS)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        image.save(out / f"{seed:03d} {prompt}.png")
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)


def _real(art: np.ndarray, subject: int, look: int) -> Tensor:
    """The icon that was asked for; for a filter style, in the first art style."""
    x = torch.from_numpy(np.array(art[subject, look if look < ART else 0])).permute(2, 0, 1)[None].float() / 255
    return x[0] if look < ART else list(filters.TRAIN_FILTERS.values())[look - ART](x).expand_as(x)[0]


def _embed_all(judge: Judge, pictures: Tensor) -> tuple[Tensor, Tensor]:
    n, art, every = pictures.shape[:3]
    content, style = judge.embed(pictures.flatten(0, 2))
    return content.unflatten(0, (n, art, every)), style.unflatten(0, (n, art, every))


def _hits(c: Tensor, s: Tensor, content: Tensor, style: Tensor, subject: int, look: int) -> tuple[bool, bool]:
    """Is the nearest subject the one asked for, and the nearest style?"""
    others = [i for i in range(ART) if i != (look if look < ART else 0)]
    subject_means = content[:, others, 0].mean(1)
    rest = [i for i in range(len(style)) if i != subject]
    style_means = torch.cat([style[rest, :, 0].mean(0), style[rest][:, :, 1:].mean((0, 1))])
    nearest = [
        int((torch.nn.functional.normalize(means) @ one).argmax())
        for means, one in ((subject_means, c), (style_means, s))
    ]
    return nearest[0] == subject, nearest[1] == look


def write(figures: dict[str, float], psnr: dict[str, float], names: tuple[str, ...], images: int, icons: Path) -> None:
    """README.md of the model folder, and the same figures as figures.json."""
    rows = [
        f"| {part} | {figures[f'drawn content {part}']:.0%} | {figures[f'drawn style {part}']:.0%} "
        f"| {figures[f'real content {part}']:.0%} | {figures[f'real style {part}']:.0%} |"
        for part in ("all", "art", "filter")
    ]
    quality = " · ".join(f"{name} {value:.1f}" for name, value in psnr.items())
    text = CARD.format(
        rows="\n".join(rows),
        psnr=quality,
        mean=np.mean(list(psnr.values())),
        count=len(names),
        names=", ".join(name.replace("-", " ") for name in sorted(names)),
        images=images,
        styles=", ".join(subjects.STYLE_WORDS[name] for name in subjects.TRAIN_SETS),
        filters=", ".join(filters.TRAIN_FILTERS),
    )
    with atomic(icons / "README.md") as part:
        part.write_text(text)
    with atomic(icons / "figures.json") as part:
        part.write_text(json.dumps({**figures, **{f"psnr {k}": v for k, v in psnr.items()}}, indent=2) + "\n")


CARD = """# `icons`: the embedded base

A text-to-image model with SDXL's architecture in miniature (same block types and names, two text encoders, size and
crop conditioning), trained from scratch on open-licensed icon sets. `StableDiffusionXLPipeline.from_pretrained` loads
this folder as it is. It exists so that unbraid can be tried, tested and measured without a download: it draws icons,
and nothing else. v-prediction with zero terminal SNR, trailing timesteps.

**Prompts** such as `a panda in flat style`. Styles: {styles}; and as filters: {filters}.
It was trained on {images:,} images of {count} subjects: {names}.

## Figures

Judged top-1 on 200 prompts, trained subjects × trained styles, half in art styles and half in filter styles (25 steps,
guidance 4), and of the real icons beside them as the ceiling:

| | content | style | real icons: content | real icons: style |
|---|---|---|---|---|
{rows}

Autoencoder, PSNR in dB on held-out subjects: {psnr} · mean {mean:.1f}.

Made again by `python -m tools.recipe card --work DIR`.

## How it was made

`python -m tools.recipe make --work DIR` does all of it, resumes when killed, and needs a network (npm) only to
fetch the art. 156 single-word subjects, two whole icon sets (`line art`, `stencil`) and three filters are held out from
all training. Art, authors and licences: ATTRIBUTION.md. The weights are Apache-2.0.
"""
