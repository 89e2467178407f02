"""Validates the judge: retrieval and ROC on real icons of subjects and sets that it was not trained on."""

from collections.abc import Callable
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.bench.truth.judge import Judge, retrieval_top1, roc_auc
from unbraid.bench.truth.subjects import HELD_OUT_SETS, SETS, held_out

Alteration = Callable[[Tensor], Tensor]
SHIFT = 3  # pixels
SIGMA = 1.0  # pixels
HELD_OUT = tuple(SETS.index(name) for name in HELD_OUT_SETS)


def shifted(pictures: Tensor) -> Tensor:
    """Shift each picture `[n, 3, h, w]` by up to ±3 px in both directions, at random (seeded). Edges are repeated."""
    rng = torch.Generator().manual_seed(0)
    corners = torch.randint(2 * SHIFT + 1, (len(pictures), 2), generator=rng).tolist()
    padded, (height, width) = F.pad(pictures, (SHIFT,) * 4, mode="replicate"), pictures.shape[-2:]
    return torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, corners, strict=True)])


def softened(pictures: Tensor) -> Tensor:
    """Blur pictures `[n, 3, h, w]` with a Gaussian of 1 px."""
    taps = torch.arange(-3, 4, dtype=pictures.dtype)
    kernel = torch.softmax(-(taps**2) / (2 * SIGMA**2), 0)
    weight = (kernel[:, None] * kernel)[None, None].expand(3, 1, -1, -1)
    return F.conv2d(F.pad(pictures, (3, 3, 3, 3), mode="replicate"), weight, groups=3)


def validate(judge: Judge, art: Tensor, names: tuple[str, ...], vae: Alteration | None = None) -> dict[str, float]:
    """All figures of the judge on the held-out subjects among `names` (the first 100).

    `art`: float `[subject, set, 3, h, w]` in 0..1, sets in the order of `subjects.SETS`. `vae`: reconstructs pictures
    `[n, 3, h, w]` in 0..1. Queries are clean, shifted, blurred or reconstructed; the gallery is always clean.
    Content top-1: how often the nearest picture in another set shows the same subject (chance 1 %). Style top-1: how often
    the nearest picture of another subject is from the same set (six sets, chance 1/6).
    """
    rows = [i for i, name in enumerate(names) if name in held_out()][:100]
    pictures = art[rows].flatten(0, 1)
    gallery = judge.embed(pictures)
    out = _figures(gallery, gallery, "")
    alterations: dict[str, Alteration] = {"shifted": shifted, "blurred": softened} | ({"vae": vae} if vae else {})
    for name, alter in alterations.items():
        out |= _figures(judge.embed(alter(pictures)), gallery, f"{name}/")
    return out


def _figures(queries: tuple[Tensor, Tensor], gallery: tuple[Tensor, Tensor], prefix: str) -> dict[str, float]:
    figures = content_figures(queries[0], gallery[0]) | _style(queries[1], gallery[1])
    return {prefix + key: value for key, value in figures.items()}


def content_figures(queries: Tensor, gallery: Tensor) -> dict[str, float]:
    """Retrieval of subjects: unit rows `[subject · set, d]`, all sets of a subject together, in the order of `subjects.SETS`."""
    by_set, found = (t.unflatten(0, (-1, len(SETS))) for t in (queries, gallery))
    labels = torch.arange(len(by_set))
    top1 = {
        (a, b): retrieval_top1(by_set[:, a], found[:, b], labels, labels) for a, b in permutations(range(len(SETS)), 2)
    }
    unseen = {pair for pair in top1 if set(pair) & set(HELD_OUT)}
    subject, style = _labels(len(queries))
    across = style[:, None] != style
    return {
        "content_top1": _mean(list(top1.values())),
        "content_top1_trained_sets": _mean([value for pair, value in top1.items() if pair not in unseen]),
        "content_top1_held_out_sets": _mean([top1[pair] for pair in unseen]),
        **{f"content_top1_from_{SETS[a]}": _mean([v for p, v in top1.items() if p[0] == a]) for a in range(len(SETS))},
        "content_auc": roc_auc((queries @ gallery.T)[across], (subject[:, None] == subject)[across]),
    }


def _style(queries: Tensor, gallery: Tensor) -> dict[str, float]:
    subject, style = _labels(len(queries))
    same = subject[:, None] == subject
    each = [
        retrieval_top1(queries[style == s], gallery, style[style == s], style, same[style == s])
        for s in range(len(SETS))
    ]
    return {
        "style_top1": _mean(each),
        "style_top1_trained_sets": _mean([each[s] for s in range(len(SETS)) if s not in HELD_OUT]),
        "style_top1_held_out_sets": _mean([each[s] for s in HELD_OUT]),
        "style_auc": roc_auc((queries @ gallery.T)[~same], (style[:, None] == style)[~same]),
    }


def _labels(count: int) -> tuple[Tensor, Tensor]:
    every = torch.arange(count)
    return every // len(SETS), every % len(SETS)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
