"""The benchmark's world: subjects that the base has never seen, styles that it has never seen, and for every subject in every
style the true picture, as an artist drew it."""

from dataclasses import dataclass
from functools import cache

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unbraid.bases.recipe.filters import HELD_OUT_FILTERS
from unbraid.bases.recipe.subjects import STYLE_WORDS, TRAIN_SETS
from unbraid.bench.art import Art, held_out_art, known_art, to_image

TRAINED = tuple(STYLE_WORDS[of] for of in TRAIN_SETS)  # art styles that the base knows
DRAWN = {word: (of, "") for of, word in STYLE_WORDS.items()} | {  # style → icon set, and a held-out filter of it
    "pencil": ("noto", "pencil"),
    "emboss": ("noto", "emboss"),
    "thermal": ("fluent-emoji-flat", "thermal"),
}
BEFORE = {
    "stencil": "minimal",
    "pencil": "cartoon",
    "thermal": "minimal",
    "emboss": "cartoon",
}  # the same drawing without the style


@dataclass(frozen=True)
class Truth:
    """A true picture: a subject in a style."""

    subject: str
    style: str

    def __str__(self) -> str:
        return f"{self.subject}, {self.style}"

    @property
    def values(self) -> Float[Tensor, "3 h w"]:
        """In 0..1, on white."""
        return _values(self)

    @property
    def image(self) -> Image.Image:
        return to_image(self.values)


@cache
def _values(truth: Truth) -> Tensor:
    of, look = DRAWN[truth.style]
    picture = _art(truth.subject).picture(truth.subject, of)
    return HELD_OUT_FILTERS[look](picture[None]).expand(1, 3, -1, -1)[0] if look else picture


def _art(subject: str) -> Art:
    return known_art() if subject in known_art().names else held_out_art()
