"""Real held-out art, committed: 100 subjects that nothing is trained on, as six artists drew them.

The true answers of every experiment, and the source of the demonstration pictures. Licences: ATTRIBUTION.md.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unbraid.bases.recipe.subjects import SETS, held_out

SHEET = Path(__file__).with_name("heldout.webp")
COUNT = 100
COLUMNS = 10  # subjects to a row of the sheet


def held_out_art() -> tuple[Tensor, tuple[str, ...]]:
    """Float `[100, 6, 3, 64, 64]` in 0..1, subjects × `subjects.SETS` in order, on white; and the subjects' names."""
    sheet = np.asarray(Image.open(SHEET).convert("RGB"))
    rows, size = COUNT // COLUMNS, sheet.shape[0] // (COUNT // COLUMNS)
    tiles = sheet.reshape(rows, size, COLUMNS, len(SETS), size, 3).transpose(0, 2, 3, 5, 1, 4)
    pictures = torch.from_numpy(tiles.reshape(COUNT, len(SETS), 3, size, size).copy())
    return pictures.float() / 255, held_out()[:COUNT]


def write_sheet(art: np.ndarray, names: tuple[str, ...], path: Path = SHEET) -> None:
    """Pack the first 100 held-out subjects of `art`, uint8 `[subject, set, size, size, 3]`, on one lossless sheet."""
    chosen = art[[names.index(name) for name in held_out()[:COUNT]]]
    rows, size = COUNT // COLUMNS, chosen.shape[2]
    tiles = chosen.reshape(rows, COLUMNS, len(SETS), size, size, 3).transpose(0, 3, 1, 2, 4, 5)
    Image.fromarray(tiles.reshape(rows * size, -1, 3)).save(path, lossless=True, quality=100, method=6)
