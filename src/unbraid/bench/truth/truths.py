"""True pictures: a subject in a style as an artist really drew it, for every subject and style of the benchmark, including those that
the base has never seen. A user's own pictures are given as files; they can be learnt from, but have no true counterparts."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unbraid.bench.truth.art import Art, held_out_art, known_art, to_image
from unbraid.bench.truth.filters import HELD_OUT_FILTERS
from unbraid.bench.truth.subjects import STYLE_WORDS, TRAIN_SETS
from unbraid.common.errors import UsageError
from unbraid.images.crop import open_image

TRAINED = tuple(STYLE_WORDS[of] for of in TRAIN_SETS)  # art styles that the base knows
DRAWN = {word: (of, "") for of, word in STYLE_WORDS.items()} | {  # style → (icon set, held-out filter on it or "")
    "pencil": ("noto", "pencil"),
    "emboss": ("noto", "emboss"),
    "thermal": ("fluent-emoji-flat", "thermal"),
}
BEFORE = {
    "stencil": "minimal",
    "pencil": "cartoon",
    "thermal": "minimal",
    "emboss": "cartoon",
}  # style → the style of the same drawing without it


@dataclass(frozen=True)
class Truth:
    """A true picture: a subject in a style."""

    subject: str
    style: str
    file: Path | None = None  # a user's own picture

    def __str__(self) -> str:
        return f"{self.subject}, {self.style}"

    @property
    def values(self) -> Float[Tensor, "3 h w"]:
        """In 0..1, on white. UsageError for a user's own picture."""
        return _values(self)

    @property
    def image(self) -> Image.Image:
        return open_image(self.file) if self.file else to_image(self.values)


@cache
def _values(truth: Truth) -> Tensor:
    known = truth.style in DRAWN and truth.subject in (*known_art().names, *held_out_art().names)
    if truth.file or not known:
        fix = "Leave out what compares with true counterparts."
        raise UsageError("a user's own picture has no true counterpart", truth, fix)
    of, look = DRAWN[truth.style]
    picture = _art(truth.subject).picture(truth.subject, of)
    return HELD_OUT_FILTERS[look](picture[None]).expand(1, 3, -1, -1)[0] if look else picture


def _art(subject: str) -> Art:
    return known_art() if subject in known_art().names else held_out_art()
