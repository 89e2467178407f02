"""Random styles, for the judge's training: a space of styles far richer than four sets and ten filters.

A style is drawn once and applied to many pictures, so that it is a label like any other.
"""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.bench.truth.filters import Filter, blurred


def random_style(rng: random.Random) -> Filter:
    """A filter of pictures `[n, 3, h, w]` in 0..1: a random recolouring, then perhaps shading, then perhaps lines."""
    colours = rng.choice((_matrix, _matrix, _ramp, _bands, _paper))(rng)
    shade = _shading(rng) if rng.random() < 0.35 else None
    lines = _lines(rng) if rng.random() < 0.6 else None

    def apply(x: Tensor) -> Tensor:
        out = colours(x)
        out = shade(out) if shade else out
        return (lines(x, out) if lines else out).clamp(0, 1)

    return apply


def _hue(rng: random.Random) -> Tensor:
    return torch.tensor([rng.random() for _ in range(3)])[:, None, None]


def _grey(x: Tensor, weights: Tensor) -> Tensor:
    return (x * weights).sum(1, keepdim=True) / weights.sum()


def _matrix(rng: random.Random) -> Filter:
    """A linear change of colour that keeps or inverts white."""
    strength = rng.uniform(0.3, 1)
    rows = torch.tensor([[rng.random() ** 3 for _ in range(3)] for _ in range(3)])
    mixed = (1 - strength) * torch.eye(3) + strength * rows / rows.sum(1, keepdim=True)
    gamma, inverted, dim = rng.uniform(0.6, 1.8), rng.random() < 0.2, rng.choice((1.0, 1.0, rng.uniform(0.7, 1)))

    def apply(x: Tensor) -> Tensor:
        out = torch.einsum("ij,njhw->nihw", mixed, x).clamp(0, 1) ** gamma
        return (1 - out if inverted else out) * dim

    return apply


def _ramp(rng: random.Random) -> Filter:
    """Grey values to a piecewise linear ramp of two to four colours."""
    colours = [_hue(rng) for _ in range(rng.randint(2, 4))]
    colours[-1] = torch.ones(3, 1, 1) if rng.random() < 0.5 else colours[-1]
    weights = _hue(rng) + 0.2

    def apply(x: Tensor) -> Tensor:
        spot = _grey(x, weights) * (len(colours) - 1)
        return sum(((1 - (spot - i).abs()).clamp(min=0) * colour for i, colour in enumerate(colours)), torch.zeros(1))

    return apply


def _bands(rng: random.Random) -> Filter:
    """Thresholds: two to four flat tones, often black and white alone."""
    count = rng.choice((2, 2, 3, 4))
    cuts = sorted(rng.uniform(0.25, 0.95) for _ in range(count - 1))
    plain = rng.random() < 0.5
    tones = [torch.full((3, 1, 1), i / (count - 1)) if plain else _hue(rng) for i in range(count)]
    if rng.random() < 0.3:
        tones.reverse()
    weights, soft = _hue(rng) + 0.2, rng.uniform(8, 60)

    def apply(x: Tensor) -> Tensor:
        grey, out = _grey(x, weights), tones[0].expand_as(x)
        for cut, tone in zip(cuts, tones[1:], strict=True):
            share = torch.sigmoid((grey - cut) * soft)
            out = out * (1 - share) + tone * share
        return out

    return apply


def _paper(rng: random.Random) -> Filter:
    """Colours faded, perhaps almost to nothing, perhaps in few levels, on paper of one colour."""
    paper = torch.ones(3, 1, 1) if rng.random() < 0.5 else _hue(rng)
    kept, levels = rng.choice((0.15, rng.uniform(0.2, 1), 1.0)), rng.choice((0, 3, 5))

    def apply(x: Tensor) -> Tensor:
        flat = (x * levels).round() / levels if levels else x
        return paper * (1 - kept + kept * flat)

    return apply


def _shading(rng: random.Random) -> Filter:
    """A gradient across the picture, stripes, or softness."""
    kind, angle, depth = rng.randrange(3), rng.uniform(0, 6.3), rng.uniform(0.15, 0.45)
    pitch = rng.uniform(3, 8)

    def apply(x: Tensor) -> Tensor:
        if kind == 0:
            return blurred(x) * depth + x * (1 - depth)
        size = x.shape[-1]
        line = torch.linspace(-1, 1, size)
        along = line[:, None] * torch.tensor(angle).sin() + line * torch.tensor(angle).cos()
        wave = (along + 1.4) / 2.8 if kind == 1 else (along * size * 3.14 / pitch).sin() * 0.5 + 0.5
        return x * (1 - depth * wave)

    return apply


def _lines(rng: random.Random) -> Callable[[Tensor, Tensor], Tensor]:
    """Lines of one colour and width along the edges of the picture, or of its silhouette alone."""
    ink = torch.full((3, 1, 1), rng.uniform(0, 0.15)) if rng.random() < 0.6 else _hue(rng)
    width, strength = rng.choice((3, 3, 5)), rng.uniform(0.6, 1)
    outline, floor = rng.random() < 0.35, rng.uniform(0.1, 0.35)

    def apply(x: Tensor, under: Tensor) -> Tensor:
        source = (x.amin(1, keepdim=True) < 0.93).float() if outline else x
        reach = width // 2
        padded = F.pad(source, (reach,) * 4, mode="replicate")
        high, low = F.max_pool2d(padded, width, 1), -F.max_pool2d(-padded, width, 1)
        drawn = (((high - low).amax(1, keepdim=True) - floor) * 1.8).clamp(0, 1) * strength
        return under * (1 - drawn) + ink * drawn

    return apply
