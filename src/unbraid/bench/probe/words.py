"""Subjects and styles to swap, where the user names none."""

from collections.abc import Sequence

from unbraid.bases.words import words_of
from unbraid.bench.truth.art import KNOWN
from unbraid.bench.truth.truths import TRAINED

SUBJECTS = ("cat", "teapot", "castle", "bicycle", "strawberry", "robot", "fish", "tree")
STYLES = ("watercolour", "pixel art", "pencil sketch", "oil painting", "stained glass", "low poly")


def words(base: str, subjects: Sequence[str], styles: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Subjects and styles: those given, else icons for a base that draws them, else common ones."""
    known = (KNOWN, TRAINED) if draws_icons(base) else (SUBJECTS, STYLES)
    return subjects or known[0], styles or known[1]


def draws_icons(base: str) -> bool:
    """Whether a base was trained on the art that the judge knows: the embedded base, and those made from it, such as `icons-dit`."""
    known = words_of(base)
    return known is not None and {*KNOWN} <= {*known.subjects} and {*TRAINED} <= {*known.styles}
