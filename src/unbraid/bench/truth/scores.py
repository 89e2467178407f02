"""Scores of a drawing: the judge's cosines to the true picture, the distance in the base's latent space, leaks, and whether the judge
picks the right subject and style among all of them."""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unbraid.bases.base import Base
from unbraid.bench.truth.art import held_out_art, known_art
from unbraid.bench.truth.judge import Judge, load_judge
from unbraid.bench.truth.tasks import Item
from unbraid.bench.truth.truths import DRAWN, Truth


def harmonic(a: float, b: float) -> float:
    """The harmonic mean of two cosines; 0 where one of them is not positive."""
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


def likeness(image: Image.Image, truth: Truth) -> tuple[float, float]:
    """(content, style): the judge's cosines between a picture and a true picture, each in -1..1."""
    content, style = (part[0] for part in judge().embed(values_of(image)[None]))
    true = _embedded(truth)
    return float(content @ true["content"]), float(style @ true["style"])


def scored(item: Item, image: Image.Image, base: Base) -> dict[str, float]:
    """The scores of one drawing. `content`, `style`: cosines to the true picture. `distance`: see `distance`. `named`: see `named`. `leak`:
    the mean cosine to the pictures whose content or style must not show; absent if the item has none."""
    content, style = (part[0] for part in judge().embed(values_of(image)[None]))
    kinds = {"content": content, "style": style}
    found = {kind: float(mine @ _embedded(item.truth)[kind]) for kind, mine in kinds.items()}
    found["distance"] = distance(image, item.truth.image, item.truth, base)
    found["named"] = named(content, style, item.truth)
    if item.leaks:
        leaks = [float(kinds[kind] @ _embedded(truth)[kind]) for kind, truth in item.leaks.items()]
        found["leak"] = sum(leaks) / len(leaks)
    return found


def named(content: Float[Tensor, " c"], style: Float[Tensor, " s"], truth: Truth) -> float:
    """0, 0.5 or 1: the share of two questions that the judge answers correctly. Which of all subjects in this style is nearest to the
    drawing? Which of all styles of this subject is nearest?"""
    subjects = [Truth(subject, truth.style) for subject in (*known_art().names, *held_out_art().names)]
    styles = [Truth(truth.subject, style) for style in DRAWN]
    nearest = subjects[int((_gallery(truth.style) @ content).argmax())]
    closest = styles[int(torch.stack([_embedded(one)["style"] @ style for one in styles]).argmax())]
    return ((nearest == truth) + (closest == truth)) / 2


def distance(first: Image.Image, second: Image.Image, truth: Truth, base: Base) -> float:
    """Distance of two pictures in the base's latent space, divided by the distance of the true picture to an empty page. So a drawing at 1
    is as far from the true picture as an empty page is."""
    a, b, true, white = (
        latent(one, base) for one in (first, second, truth.image, Image.new("RGB", first.size, "white"))
    )
    return float((a - b).norm() / (true - white).norm())


def diversity(images: Sequence[Image.Image], truth: Truth, base: Base) -> float | None:
    """The mean distance between pictures of one prompt; None for a single picture."""
    pairs = [(a, b) for i, a in enumerate(images) for b in images[i + 1 :]]
    return sum(distance(a, b, truth, base) for a, b in pairs) / len(pairs) if pairs else None


@torch.no_grad()
def latent(image: Image.Image, base: Base) -> Tensor:
    """The mode of the autoencoder's posterior for a picture at the base's size, `[c, h, w]`."""
    side = (base.size, base.size)
    fitted = image if image.size == side else image.resize(side, Image.Resampling.LANCZOS)
    return base.vae.encode(values_of(fitted)[None].to(base.device) * 2 - 1).latent_dist.mode()[0].cpu()  # type: ignore[union-attr]


def values_of(image: Image.Image) -> Float[Tensor, "3 h w"]:
    """A picture's values in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"), np.float32)).permute(2, 0, 1) / 255


@cache
def judge() -> Judge:
    return load_judge()


@cache
def _embedded(truth: Truth) -> Mapping[str, Tensor]:
    content, style = judge().embed(truth.values[None])
    return {"content": content[0], "style": style[0]}


@cache
def _gallery(style: str) -> Tensor:
    """Content embeddings of the true pictures of all subjects in a style, `[n, 128]`."""
    subjects = (*known_art().names, *held_out_art().names)
    return judge().embed(torch.stack([Truth(subject, style).values for subject in subjects]))[0]
