"""What the base is trained to draw: which subjects, how often each, and the words of the styles."""

import json
import random
import re
from pathlib import Path

import numpy as np

from unbraid.bench.truth.filters import HELD_OUT_FILTERS, TRAIN_FILTERS
from unbraid.bench.truth.subjects import HELD_OUT_SETS, SEED, STYLE_WORDS, TRAIN_SETS, concrete, held_out

HELD_OUT = held_out()[
    :100
]  # those of the benchmark's sheet; the judge never sees the other 56 either, but the base does
STYLES = (
    *(STYLE_WORDS[name] for name in TRAIN_SETS),
    *TRAIN_FILTERS,
)  # in the order of the latents: four sets, then filters
RARE_TOKENS = ("sks", "monadikos", "unb")  # in the vocabulary, and of no meaning: names for new subjects
NOTHING = (*HELD_OUT, *HELD_OUT_FILTERS, *(STYLE_WORDS[name] for name in HELD_OUT_SETS), *RARE_TOKENS)
"""Words that are never trained with a meaning: those of what is held out, and the rare ones."""

OFTEN = 3.0  # how often a single-word concrete noun comes up, against 1 for any other subject

_ABSTRACT = re.compile(
    r"^(man|woman|person|people|women|men)-"  # the same figure some 200 times over
    r"|-oclock$|-thirty$|quarter-moon|gibbous"
    r"|-button$|^keycap|^input-|^(id|ng|vs|cl|sos|new|ok|free|cool|up|top|back|end|on|soon)-|blood-type"
    r"|arrow|^(left|right|up|down)wards|^double-|^eight-|^heavy-|pointing|^index-|^backhand|^mx-|^kissing-"
    r"|-square$|-sign$|-symbol$|mark$|^circled|^wavy|^part-alt|^dotted|^(small|large)-.*diamond|^currency|^flag-|^no-"
    r"|^mobile-phone-|^(registered|copyright|trade-mark|minus|plus|divide|multiply|information|om|khanda)$"
    r"|^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus)$"
    r"|^(passport|customs|baggage|left-luggage|restroom|mens-room|womens-room|water-closet|wireless|antenna)"
)


def trained(names: tuple[str, ...]) -> tuple[str, ...]:
    """The subjects among `names` that the base learns: all but the held-out ones and those that are signs rather than things."""
    return tuple(name for name in names if name not in HELD_OUT and (name in concrete() or not _ABSTRACT.search(name)))


def eighty() -> tuple[str, ...]:
    """The subjects of the first embedded base, on which the cards of both are compared."""
    kept = [name for name in concrete() if name not in held_out()]
    random.Random(SEED).shuffle(kept)
    return tuple(kept[:80])


def shares(names: tuple[str, ...]) -> np.ndarray:
    """How often each of the subjects comes up in training: float `[n]`, of sum 1."""
    weights = np.array([OFTEN if name in concrete() else 1.0 for name in names], np.float32)
    return weights / weights.sum()


def write(names: tuple[str, ...], base: Path) -> None:
    """`words.json` of a base's folder: the subjects and styles that its prompts may name."""
    known = {"subjects": sorted(name.replace("-", " ") for name in names), "styles": list(STYLES)}
    (base / "words.json").write_text(json.dumps(known, indent=1) + "\n")
