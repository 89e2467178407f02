"""The subjects and icon sets, divided into trained and held out. Names are those of the icon sets."""

import random
from functools import cache
from importlib.resources import files

TRAIN_SETS = ("noto", "twemoji", "fluent-emoji", "fluent-emoji-flat")
HELD_OUT_SETS = ("fluent-emoji-high-contrast", "openmoji")
SETS = TRAIN_SETS + HELD_OUT_SETS

STYLE_WORDS = {
    "noto": "cartoon",
    "twemoji": "flat",
    "fluent-emoji": "glossy",
    "fluent-emoji-flat": "minimal",
    "fluent-emoji-high-contrast": "stencil",
    "openmoji": "line art",
}

HELD_OUT = 156  # a tenth of the 1,561 subjects that are in all six sets
SEED = 20_26


@cache
def concrete() -> tuple[str, ...]:
    """Single-word, concrete, visually distinct subjects, in alphabetical order."""
    return tuple(files("unbraid.bench.truth").joinpath("concrete.txt").read_text().split())


@cache
def held_out() -> tuple[str, ...]:
    """The subjects that the judge was not trained on, in any style. The base was not trained on the first 100."""
    return tuple(sorted(random.Random(SEED).sample(concrete(), HELD_OUT)))


def trained(every: tuple[str, ...]) -> tuple[str, ...]:
    """The subjects among `every` that the judge is trained on."""
    return tuple(name for name in every if name not in held_out())
