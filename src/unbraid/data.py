"""From the user's files to pixels: upright, on white, at a size that the base can take, with honest conditioning."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unbraid.errors import UsageError
from unbraid.image_files import open_image as open_image
from unbraid.image_files import whole_size

SMALLEST_SIDE = 16  # pixels; less is not a picture
WIDEST = 4.0  # longest side over shortest; the bases were trained on at most about this
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"))


@dataclass(frozen=True)
class Pixels:
    """An image in -1..1 and SDXL's micro-conditioning: original (h, w), crop (top, left), target (h, w)."""

    values: Float[Tensor, "3 h w"]
    sizes: tuple[int, int, int, int, int, int]


def list_images(path: Path) -> list[Path]:
    """A file, or all images of a folder in name order (other files are left alone)."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise UsageError("there are no images in this folder", path, f"Accepted: {', '.join(sorted(SUFFIXES))}.")
    return found


def matched(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """Two files, or the images of two folders in name order."""
    if before.is_dir() != after.is_dir():
        raise UsageError(
            "one is a folder and the other is not", f"{before} and {after}", "Give two files or two folders."
        )
    first, second = list_images(before), list_images(after)
    if len(first) != len(second):
        what = f"{len(first)} pictures before and {len(second)} after"
        raise UsageError(what, f"{before} and {after}", "Give every picture its counterpart, in the same name order.")
    return list(zip(first, second, strict=True))


def alignment(before: Image.Image, after: Image.Image) -> float:
    """-1..1: the correlation of where two pictures have their edges, at 32×32. Drawings that lie on each other have 0.44 in
    the middle even as a flat picture and its stencil, pictures of two things 0.09 (docs/LOG.md)."""
    maps = []
    for image in (before, after):
        gray = np.asarray(image.convert("L").resize((64, 64), Image.Resampling.BOX), np.float32)
        down, right = np.gradient(gray)
        maps.append(np.hypot(down, right).reshape(32, 2, 32, 2).mean((1, 3)).ravel())
    if not all(one.std() > 0 for one in maps):
        return 0.0
    return float(np.corrcoef(*maps)[0, 1])


def caption_of(path: Path) -> str | None:
    """The text of NAME.txt beside NAME.png, as kohya's trainers have it; None without one."""
    file = path.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        text = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot be read as text", file, "Save it as UTF-8, or take it away.") from error
    if not text:
        raise UsageError("the caption is empty", file, "Write what the picture shows, or take the file away.")
    return text


def check_size(image: Image.Image, where: object = "") -> None:
    """UsageError for a picture too small or too long to be used."""
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
    """Scale to about `area` square pixels, aspect kept, sides multiples of `step`; crop what is left over, centred. Also: where the
    crop begins, (top, left)."""
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
    """`cropped`, as pixels with their micro-conditioning."""
    done, top, left = cropped(image, area, step, where)
    values = torch.from_numpy(np.array(done, np.float32)).permute(2, 0, 1) / 127.5 - 1
    width, height = whole_size(image)
    return Pixels(values, (height, width, top, left, done.height, done.width))
