"""Real art at 128 px: the inputs of every experiment and the true pictures of every drawing. Licences: ATTRIBUTION.md.

`held_out.webp`: 100 subjects in six icon sets, which neither base nor judge was trained on. `known.webp`: subjects that the base knows,
to see a new style on them.
"""

from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unbraid.bench.truth.subjects import SETS, held_out

FOLDER = Path(__file__).parent
SHEETS = ("held_out.webp", "known.webp")
HELD_OUT = held_out()[:100]
KNOWN = tuple(
    "dog umbrella violin strawberry balloon bat bird bomb broccoli castle chicken crown doughnut dragon gorilla koala lime "
    "melon mouse onion panda pineapple shark teapot".split()
)
COLUMNS = 10  # most subjects in a row of a sheet; fewer if the last row would have gaps


@dataclass(frozen=True)
class Art:
    """Pictures in 0..1 on white, subjects × `subjects.SETS` in order."""

    values: Float[Tensor, "subject set 3 h w"]
    names: tuple[str, ...]

    def picture(self, subject: str, of: str) -> Float[Tensor, "3 h w"]:
        return self.values[self.names.index(subject), SETS.index(of)]

    def image(self, subject: str, of: str) -> Image.Image:
        return to_image(self.picture(subject, of))


def to_image(values: Float[Tensor, "3 h w"]) -> Image.Image:
    """Values in 0..1 as a picture."""
    return Image.fromarray((values * 255).round().byte().permute(1, 2, 0).numpy())


@cache
def held_out_art() -> Art:
    return _read(FOLDER / SHEETS[0], HELD_OUT)


@cache
def known_art() -> Art:
    return _read(FOLDER / SHEETS[1], KNOWN)


def write_sheets(art: np.ndarray, names: tuple[str, ...]) -> None:
    """Write both sheets, losslessly, from all art: uint8 `[subject, set, h, w, 3]`."""
    for file, wanted in zip(SHEETS, (HELD_OUT, KNOWN), strict=True):
        chosen = art[[names.index(name) for name in wanted]]
        columns = gcd(COLUMNS, len(wanted))
        rows, size = len(wanted) // columns, chosen.shape[2]
        tiles = chosen.reshape(rows, columns, len(SETS), size, size, 3).transpose(0, 3, 1, 2, 4, 5)
        sheet = Image.fromarray(tiles.reshape(rows * size, -1, 3))
        sheet.save(FOLDER / file, lossless=True, quality=100, method=6)


def _read(path: Path, names: tuple[str, ...]) -> Art:
    sheet = np.asarray(Image.open(path).convert("RGB"))
    columns = gcd(COLUMNS, len(names))
    rows = len(names) // columns
    size = sheet.shape[0] // rows
    tiles = sheet.reshape(rows, size, columns, len(SETS), size, 3).transpose(0, 2, 3, 5, 1, 4)
    pictures = torch.from_numpy(tiles.reshape(len(names), len(SETS), 3, size, size).copy())
    return Art(pictures.float() / 255, names)
