"""From a picture to pixels at a size that the base supports, with the matching micro-conditioning."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.images.captions import caption_of as caption_of
from unbraid.images.opening import open_image as open_image
from unbraid.images.opening import whole_size

SMALLEST_SIDE = 16  # pixels
WIDEST = 4.0  # longest side divided by shortest; bases were trained on ratios up to about this


@dataclass(frozen=True)
class Pixels:
    """An image in -1..1 and SDXL's micro-conditioning: original (h, w), crop (top, left), target (h, w)."""

    values: Float[Tensor, "3 h w"]
    sizes: tuple[int, int, int, int, int, int]


def alignment(before: Image.Image, after: Image.Image) -> float:
    """How well two pictures are aligned: the correlation of their edge maps at 32×32, in -1..1. The median is 0.44 for a flat drawing and
    its stencil, and 0.09 for pictures of two different subjects (docs/LOG.md)."""
    maps = []
    for image in (before, after):
        gray = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX), np.float32)
        down, right = np.gradient(gray)
        maps.append(np.hypot(down, right).reshape(32, 2, 32, 2).mean((1, 3)).ravel())
    if not all(one.std() > 0 for one in maps):
        return 0.0
    return float(np.corrcoef(*maps)[0, 1])


def check_size(image: Image.Image, where: object = "") -> None:
    """UsageError for a picture that is too small, or too long for its width."""
    width, height = whole_size(image)
    if min(width, height) < SMALLEST_SIDE:
        raise UsageError(
            f"the image is only {width}×{height} pixels", where, f"Both sides must be {SMALLEST_SIDE} or more."
        )
    if max(width, height) > WIDEST * min(width, height):
        raise UsageError(
            f"the image is {width}×{height}, too long for its width", where, f"Crop it to {WIDEST:.0f}:1 or less."
        )


def cropped(image: Image.Image, area: int, step: int, where: object = "") -> tuple[Image.Image, int, int]:
    """Scale a picture to about `area` pixels, keeping its aspect ratio, and crop it at the centre so that both sides are multiples of
    `step`. Returns the picture and the position of the crop, (picture, top, left)."""
    check_size(image, where)
    width, height = image.size
    scale = (area / (width * height)) ** 0.5
    target_w, target_h = (max(step, round(side * scale / step) * step) for side in (width, height))
    scale = max(target_w / width, target_h / height)
    resized = image.resize(
        (max(target_w, round(width * scale)), max(target_h, round(height * scale))), Image.Resampling.LANCZOS
    )
    left, top = (resized.width - target_w) // 2, (resized.height - target_h) // 2
    return resized.crop((left, top, left + target_w, top + target_h)), top, left


def fit(image: Image.Image, area: int, step: int, where: object = "") -> Pixels:
    """A picture scaled and cropped by `cropped`, as pixels with their micro-conditioning."""
    done, top, left = cropped(image, area, step, where)
    values = torch.from_numpy(np.array(done, np.float32)).permute(2, 0, 1) / 127.5 - 1
    width, height = whole_size(image)
    return Pixels(values, (height, width, top, left, done.height, done.width))
