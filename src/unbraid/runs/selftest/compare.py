"""How LoRAs and pictures of `unbraid selftest` are compared."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from unbraid.common.errors import UsageError
from unbraid.core.lowrank import delta
from unbraid.files.lora_file import LoraFile, read

SEEN = 2  # of 255 levels: what rounding may change in a picture on a CPU, and what a LoRA has to exceed


def changes(file: LoraFile) -> Iterator[np.ndarray]:
    """The ΔW of every layer."""
    return (delta(lora).float().numpy() for _, lora in sorted(file.modules.items()))


def apart(one: Path, other: Path) -> float:
    """‖ΔW − ΔW′‖ / ‖ΔW‖ of two files, over all layers."""
    gap = whole = 0.0
    for a, b in zip(changes(read(one)), changes(read(other)), strict=True):
        gap, whole = gap + float(((a - b) ** 2).sum()), whole + float((a**2).sum())
    return (gap / whole) ** 0.5


def differs(picture: np.ndarray, other: np.ndarray, what: str) -> None:
    if picture.shape != other.shape:
        raise UsageError(f"the picture's size is {picture.shape}, not {other.shape}", what)
    if (change := np.abs(picture - other).max()) <= SEEN:
        raise UsageError(f"changes nothing in the picture: {change} of 255 levels", what)


def pixels(image: Image.Image) -> np.ndarray:
    """`[h, w, 3]`. UsageError for a picture of one colour, which is what NaN becomes."""
    found = np.asarray(image.convert("RGB")).astype(int)
    if found.min() == found.max():
        raise UsageError(f"the picture is of one colour, {found.min()}", "drawing")
    return found
