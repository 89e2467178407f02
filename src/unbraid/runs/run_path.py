"""A run folder as the verbs return it: a path that notebooks show as the run's sheet."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from unbraid.common.errors import UsageError

if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())  # before Python 3.12, Path itself cannot have subclasses


class Run(_Path):
    """The folder of a run. It is a path in every way: `run / "style.safetensors"` is a file of it."""

    @property
    def sheet(self) -> Image.Image:
        """The run's contact sheet: its inputs, and what the base draws with and without each LoRA.

        UsageError if there is none, as after `previews=0`."""
        path = self / "sheet.png"
        if not path.is_file():
            raise UsageError("there is no sheet in this folder", self, "Train with previews, or draw with generate.")
        with Image.open(path) as image:
            return image.convert("RGB")

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows of a run (IPython's protocol): its sheet; None, and so the path, if there is none."""
        path = self / "sheet.png"
        return path.read_bytes() if path.is_file() else None
