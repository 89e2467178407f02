"""The scores that papers report, with the models of `models.py`: CLIP-I, CLIP-T, DINO, CSD, LPIPS, diversity.

They reward copying (docs/field-metrics.md). Therefore each is measured both to the content's pictures and to the style's: a high score to
the pictures whose look was not requested is a leak."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from unbraid.bench.field.models import Clip, Encoder, FieldModels, Lpips

BATCH = 16  # pictures per forward pass
LPIPS_SIDE = 256  # pixels: both pictures are cropped to squares and resized to this side
TEXT = "CLIP-T"
LOWER_IS_NEARER = ("LPIPS", "patch distance")  # distances; everything else is a cosine, or diversity
Pictures = Sequence[Image.Image]


def measure(
    models: FieldModels, pictures: Pictures, prompts: Sequence[str], contents: Pictures = (), styles: Pictures = ()
) -> dict[str, list[float]]:
    """Column → one value per picture. Columns of missing models and missing references are left out.

    `prompts`: the prompt of each picture, without rare tokens such as `sks`, which mean nothing to CLIP. `contents`, `styles`: the pictures
    that were learnt from; a score is the mean over them."""
    out: dict[str, list[float]] = {}
    references = {"content": contents, "style": styles}
    named = {role: some for role, some in references.items() if some}
    for encoder in _encoders(models):
        own = embed(encoder, pictures)
        for role, some in named.items():
            out[f"{encoder.label} to {role}"] = (own @ embed(encoder, some).T).mean(1).tolist()
        if encoder.patches:
            for role, some in named.items():
                out[f"{encoder.label} patch distance to {role}"] = patch_distance(encoder, pictures, some).tolist()
    if models.lpips:
        for role, some in named.items():
            rows = [lpips(models.lpips, [picture] * len(some), some).mean().item() for picture in pictures]
            out[f"{models.lpips.label} to {role}"] = rows
    if models.clip:
        out[TEXT] = (embed(models.clip.image, pictures) * embed_texts(models.clip, prompts)).sum(1).tolist()
    return out


def diversity(models: FieldModels, pictures: Pictures) -> dict[str, float]:
    """Mean distance between the pictures of one prompt: 1 − cosine for each image model, and LPIPS. It is zero if every seed gives the same
    picture. Empty for fewer than two pictures."""
    if len(pictures) < 2:
        return {}
    first, second = torch.triu_indices(len(pictures), len(pictures), offset=1).tolist()
    out = {}
    for encoder in _encoders(models):
        rows = embed(encoder, pictures)
        out[f"{encoder.label} diversity"] = (1 - (rows[first] * rows[second]).sum(1)).mean().item()
    if models.lpips:
        pairs = lpips(models.lpips, [pictures[i] for i in first], [pictures[i] for i in second])
        out[f"{models.lpips.label} diversity"] = pairs.mean().item()
    return out


def _encoders(models: FieldModels) -> list[Encoder]:
    found = (models.clip.image if models.clip else None, models.dino, models.csd)
    return [encoder for encoder in found if encoder]


@torch.no_grad()
def embed(encoder: Encoder, pictures: Pictures, batch: int = BATCH) -> Float[Tensor, "n d"]:
    """One vector per picture, of unit norm, on the CPU."""
    parts = [encoder.vectors(_prepared(encoder, pictures[i : i + batch])) for i in range(0, len(pictures), batch)]
    return F.normalize(torch.cat(parts).float(), dim=1).cpu()


@torch.no_grad()
def embed_texts(clip: Clip, prompts: Sequence[str], batch: int = BATCH) -> Float[Tensor, "n d"]:
    """One vector per prompt, of unit norm, on the CPU. Repeated prompts are computed once."""
    single = list(dict.fromkeys(prompts))
    parts = [clip.text(single[i : i + batch]) for i in range(0, len(single), batch)]
    rows = F.normalize(torch.cat(parts).float(), dim=1).cpu()
    return rows[[single.index(prompt) for prompt in prompts]]


@torch.no_grad()
def patch_distance(encoder: Encoder, pictures: Pictures, references: Pictures) -> Float[Tensor, " n"]:
    """1 − the mean cosine of the patches at the same place, averaged over the references: how far a picture's layout is from theirs. Like
    LPIPS it compares features place by place, but unlike LPIPS nothing in it was fitted to human judgement."""
    assert encoder.patches
    known = [F.normalize(encoder.patches(_prepared(encoder, [one])), dim=-1) for one in references]
    out = []
    for i in range(0, len(pictures), BATCH):
        own = F.normalize(encoder.patches(_prepared(encoder, pictures[i : i + BATCH])), dim=-1)
        out.append(torch.stack([1 - (own * one).sum(-1).mean(-1) for one in known]).mean(0))
    return torch.cat(out).cpu()


@torch.no_grad()
def lpips(model: Lpips, first: Pictures, second: Pictures, batch: int = BATCH) -> Float[Tensor, " n"]:
    """LPIPS between `first[i]` and `second[i]`."""
    parts = [
        model.distance(*(_square(some[i : i + batch]).to(model.device) for some in (first, second)))
        for i in range(0, len(first), batch)
    ]
    return torch.cat(parts).cpu()


def _prepared(encoder: Encoder, pictures: Pictures) -> Tensor:
    return encoder.prepare([picture.convert("RGB") for picture in pictures]).to(encoder.device)


def _square(pictures: Pictures) -> Float[Tensor, "n 3 h w"]:
    size = (LPIPS_SIDE, LPIPS_SIDE)
    fitted = [ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.BICUBIC) for picture in pictures]
    values = np.stack([np.asarray(picture, np.float32) for picture in fitted])
    return torch.from_numpy(values).permute(0, 3, 1, 2) / 127.5 - 1


def merged(columns: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Several results of `measure`, concatenated."""
    out: dict[str, list[float]] = {}
    for one in columns:
        for name, values in one.items():
            out.setdefault(name, []).extend(values)
    return out
