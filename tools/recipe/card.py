"""The last stage: measure a base with the judge, and write its model card."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor

from tools.recipe import sheet, vae, words
from unbraid.bases.base import Base, load
from unbraid.bench.truth import filters, subjects
from unbraid.bench.truth.judge import Judge, load_judge
from unbraid.common.atomic import atomic
from unbraid.sampling.sample import NEGATIVE, classifier_free, generate

PROMPTS = 200  # of each of the two sets of subjects
GUIDANCE, STEPS = sheet.GUIDANCE, sheet.STEPS
ART = len(subjects.TRAIN_SETS)
FILTERS = tuple(filters.TRAIN_FILTERS.values())


@dataclass(frozen=True)
class Asked:
    """One prompt: which subject and which style it names, and whether its subject is to be found among the few or among all."""

    subject: int  # index into the names
    style: int  # index into words.STYLES
    among: tuple[int, ...]  # the subjects that its content is told from

    @property
    def art(self) -> int:
        """The set in which the real icon is drawn: for a filter style, the first."""
        return self.style if self.style < ART else 0


def looks(art: np.ndarray) -> Tensor:
    """uint8 `[n, 4, h, w, 3]` to float `[n, 4, 1 + filters, 3, h, w]`: every picture plain and under every filter."""
    x = torch.from_numpy(np.array(art)).permute(0, 1, 4, 2, 3).float() / 255
    flat = x.flatten(0, 1)
    every = [flat, *(f(flat).expand_as(flat) for f in FILTERS)]
    return torch.stack(every, 1).unflatten(0, x.shape[:2])


class Gallery:
    """The real icons as the judge sees them: the content of all subjects, and the styles as the few draw them.

    Content: a subject is the mean of its plain pictures in the art styles other than the one asked for. Style: a style is the mean
    over all of the few but the subject asked for."""

    def __init__(self, judge: Judge, art: np.ndarray, few: Sequence[int]) -> None:
        self.few = tuple(few)
        plain = [judge.embed(looks(art[i : i + 1])[0, :, 0])[0] for i in range(len(art))]
        self.content = torch.stack(plain)  # [subject, set, d]
        styles = [judge.embed(looks(art[i : i + 1])[0].flatten(0, 1))[1].unflatten(0, (ART, -1)) for i in self.few]
        self.style = torch.stack(styles)  # [few, set, 1 + filters, e]

    def content_rank(self, content: Tensor, asked: Asked) -> int:
        """How many of the subjects are nearer to a picture's content than the one asked for."""
        others = [i for i in range(ART) if i != asked.art]
        means = F.normalize(self.content[list(asked.among)][:, others].mean(1))
        scores = means @ content
        return int((scores > scores[asked.among.index(asked.subject)]).sum())

    def style_hit(self, style: Tensor, asked: Asked) -> bool:
        rest = self.style[[i for i, subject in enumerate(self.few) if subject != asked.subject]]
        means = torch.cat([rest[:, :, 0].mean(0), rest[:, :, 1:].mean((0, 1))])
        return int((F.normalize(means) @ style).argmax()) == asked.style


def prompts(names: tuple[str, ...], few: tuple[int, ...], count: int = PROMPTS) -> list[Asked]:
    """`count` prompts that name one of the few, and as many that name any subject, if there are more. Of each part, one half is
    in art styles, one in filter styles."""
    out = []
    for among in (few, tuple(range(len(names))))[: 1 if len(few) == len(names) else 2]:
        rng = random.Random(0)
        for i in range(count):
            style = rng.randrange(ART) if i % 2 == 0 else ART + rng.randrange(len(FILTERS))
            out.append(Asked(among[rng.randrange(len(among))], style, among))
    return out


def measure(
    folder: Path, art: np.ndarray, names: tuple[str, ...], out: Path | None = None, count: int = PROMPTS
) -> dict[str, float]:
    """Judged content and style of drawings of the base in `folder`, and of the real icons beside them.

    `art`: uint8 `[subject, 4, h, w, 3]` of the trained subjects. `out`: folder to keep the drawings in; those that are there
    are not drawn again. `count`: as in `prompts`."""
    base, judge, few = load(str(folder)), load_judge(), tuple(names.index(name) for name in words.eighty())
    gallery, asked = Gallery(judge, art, few), prompts(names, few, count)
    drawn = [_drawn(base, one, names, seed, out) for seed, one in enumerate(track(asked, "drawing"))]
    real = [_real(art, one) for one in asked]
    figures: dict[str, float] = {}
    for kind, pictures in (("drawn", drawn), ("real", real)):
        content, style = judge.embed(torch.stack(pictures))
        ranks = np.array([gallery.content_rank(c, one) for c, one in zip(content, asked, strict=True)])
        hits = np.array([gallery.style_hit(s, one) for s, one in zip(style, asked, strict=True)])
        figures |= {f"{kind} {key}": value for key, value in _shares(asked, ranks, hits).items()}
    return figures


def _shares(asked: Sequence[Asked], ranks: np.ndarray, hits: np.ndarray) -> dict[str, float]:
    styles = np.array([one.style for one in asked])
    few = np.array([one.among == asked[0].among for one in asked])  # the first ones name one of the few
    parts = {"all": few, "art": few & (styles < ART), "filter": few & (styles >= ART)}
    out = {f"content {part}": float((ranks[chosen] == 0).mean()) for part, chosen in parts.items()}
    out |= {f"style {part}": float(hits[chosen].mean()) for part, chosen in parts.items()}
    out |= (
        {}
        if few.all()
        else {
            "content top-1 of every": float((ranks[~few] == 0).mean()),
            "content top-5 of every": float((ranks[~few] < 5).mean()),
        }
    )
    for i, word in enumerate(words.STYLES):
        out |= {
            f"content in {word}": float((ranks[styles == i] == 0).mean()),
            f"style {word}": float(hits[styles == i].mean()),
        }
    return out


def reconstruction(folder: Path, held_out: np.ndarray) -> dict[str, float]:
    """PSNR in dB of the autoencoder on held-out subjects, uint8 `[n, 6, h, w, 3]`, per set."""
    model = vae.read(folder)
    x = torch.from_numpy(np.array(held_out)).permute(0, 1, 4, 2, 3).float() / 255
    return {name: vae.psnr(model, x[:, i]) for i, name in enumerate(subjects.SETS)}


def _drawn(base: Base, asked: Asked, names: tuple[str, ...], seed: int, out: Path | None) -> Tensor:
    prompt = f"a {names[asked.subject].replace('-', ' ')} in {words.STYLES[asked.style]} style"
    file = out / f"{seed:03d} {prompt}.png" if out else None
    if file and file.exists():
        return _values(np.asarray(Image.open(file)))
    encoded = {"main": base.encode_prompt(prompt), NEGATIVE: base.encode_negative()}
    (image,) = generate(base, classifier_free(GUIDANCE, "main"), encoded, seeds=(seed,), steps=STEPS)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return _values(np.asarray(image))


def _values(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def _real(art: np.ndarray, asked: Asked) -> Tensor:
    """The icon that was asked for."""
    x = _values(art[asked.subject, asked.art])[None]
    return x[0] if asked.style < ART else FILTERS[asked.style - ART](x).expand_as(x)[0]


def write(figures: dict[str, float], psnr: dict[str, float], names: tuple[str, ...], images: int, base: Path) -> None:
    """README.md of the model folder, and the same figures as figures.json."""
    rows = [
        f"| {part} | {figures[f'drawn content {part}']:.0%} | {figures[f'drawn style {part}']:.0%} "
        f"| {figures[f'real content {part}']:.0%} | {figures[f'real style {part}']:.0%} |"
        for part in ("all", "art", "filter")
    ]
    every = [
        f"| {kind} | {figures[f'{kind} content top-1 of every']:.0%} | {figures[f'{kind} content top-5 of every']:.0%} |"
        for kind in ("drawn", "real")
    ]
    styles = [
        f"| {word} | {figures[f'drawn content in {word}']:.0%} | {figures[f'drawn style {word}']:.0%} "
        f"| {figures[f'real content in {word}']:.0%} | {figures[f'real style {word}']:.0%} |"
        for word in words.STYLES
    ]
    text = CARD.format(
        rows="\n".join(rows),
        every="\n".join(every),
        by_style="\n".join(styles),
        psnr=" · ".join(f"{name} {value:.1f}" for name, value in psnr.items()),
        mean=np.mean(list(psnr.values())),
        count=len(names),
        images=images,
        styles=", ".join(subjects.STYLE_WORDS[name] for name in subjects.TRAIN_SETS),
        filters=", ".join(filters.TRAIN_FILTERS),
    )
    with atomic(base / "README.md") as part:
        part.write_text(text)
    with atomic(base / "figures.json") as part:
        part.write_text(json.dumps({**figures, **{f"psnr {k}": v for k, v in psnr.items()}}, indent=2) + "\n")


CARD = """# `icons`: the embedded base

A text-to-image model with SDXL's architecture in miniature (same block types and names, two text encoders, size and
crop conditioning), trained from scratch on open-licensed icon sets: 128 px pictures, 16×16 latents of 16 channels.
`StableDiffusionXLPipeline.from_pretrained` loads this folder as it is. It exists so that unbraid can be tried, tested
and measured without a download: it draws icons, and nothing else. v-prediction with zero terminal SNR, trailing timesteps.

![Ten subjects in six styles](sheet.webp)

**Prompts** such as `a panda in flat style`. Styles: {styles}; and as filters: {filters}.
It was trained on {images:,} images of {count} subjects; `words.json` lists them.

## Figures

Read off by the judge (docs/judge.md), 25 steps, guidance 4; beside them the real icons, as the ceiling. Top-1: is the
nearest subject the one asked for, and the nearest style?

200 prompts, 80 subjects (those of the base before this one) × 14 styles; content is told from the 80:

| | content | style | real icons: content | real icons: style |
|---|---|---|---|---|
{rows}

200 prompts, all {count} subjects × 14 styles; content is told from all {count}:

| | content top-1 | content top-5 |
|---|---|---|
{every}

By style, both sets of prompts together:

| | content | style | real icons: content | real icons: style |
|---|---|---|---|---|
{by_style}

Autoencoder, PSNR in dB on held-out subjects: {psnr} · mean {mean:.1f}.

Made again by `python -m tools.recipe card --work DIR`.

## How it was made

`python -m tools.recipe make --work DIR` does all of it, resumes when killed, and needs a network (npm) only to
fetch the art; docs/LOG.md says what was run for the committed weights. 100 single-word subjects, two whole icon sets
(`line art`, `stencil`) and three filters are held out from all training. Art, authors and licences: ATTRIBUTION.md. The
weights are Apache-2.0.
"""
