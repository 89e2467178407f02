"""Subjects and styles to swap, where the user names none."""

from collections.abc import Sequence

from unbraid.bench.truth.art import KNOWN
from unbraid.bench.truth.truths import TRAINED

SUBJECTS = ("cat", "teapot", "castle", "bicycle", "strawberry", "robot", "fish", "tree")
STYLES = ("watercolour", "pixel art", "pencil sketch", "oil painting", "stained glass", "low poly")


def words(base: str, subjects: Sequence[str], styles: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Subjects and styles: those given, else those that the embedded base was trained on, else common ones."""
    known = (KNOWN, TRAINED) if base == "icons" else (SUBJECTS, STYLES)
    return subjects or known[0], styles or known[1]
