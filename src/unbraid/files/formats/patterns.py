"""The alpha of a module from PEFT's settings, whose patterns are matched as PEFT matches them. No torch."""

import re
from collections.abc import Mapping
from functools import cache
from math import isfinite
from typing import Any

from unbraid.common.errors import UsageError

MAX_PATTERNS = 20_000
MAX_PATTERN = 500  # characters
_PLAIN = re.compile(r"\^?(?:\\\.|[A-Za-z0-9_.\-])*")
_REPEATS = re.compile(r"[*+]|\{\d*,\d*\}")
Pattern = tuple[str | None, ...]  # the characters of a plain pattern; None matches any


def alpha_of(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """A module's alpha from PEFT's settings (`alpha_pattern`, then `lora_alpha`, scaled for rsLoRA), or its rank if they have none.

    Errors: an alpha that is no number, or not a finite one; patterns that are not regular expressions, or could take too long to match."""
    component, _, path = module.partition(".")
    mine = {
        key.partition(".")[2]: value for key, value in settings.items() if key.startswith(component + ".")
    } or settings
    alpha = mine.get("lora_alpha", rank)
    pattern = mine.get("alpha_pattern")
    if isinstance(pattern, dict) and pattern:
        # transformers 5 removed `text_model`, so the patterns may be for the short name
        hits = (first_match(tuple(pattern), name) for name in dict.fromkeys((path, path.removeprefix("text_model."))))
        hit = next((key for key in hits if key is not None), None)
        alpha = alpha if hit is None else pattern[hit]
    if alpha is None:
        return float(rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UsageError("alpha is not a number", module, "The adapter's settings are damaged.")
    if abs(alpha) > 1e30 or not isfinite(alpha):
        raise UsageError("alpha is not a finite number", module, "The adapter's settings are damaged.")
    return alpha * rank**0.5 if mine.get("use_rslora") else float(alpha)


def first_match(keys: tuple[str, ...], path: str) -> str | None:
    """The first key for which `(.*\\.)?(key)$` matches the path, as in peft.utils.other.get_pattern_key."""
    plain, other = _sorted(keys)
    ends = {len(path) - i for i in (0, *(i + 1 for i, letter in enumerate(path) if letter == "."))}
    best = len(keys)
    for length in ends:
        for place, anchored, letters in plain.get(length, ()):
            whole = not anchored or length == len(path)
            if (
                place < best
                and whole
                and all(a in (None, b) for a, b in zip(letters, path[len(path) - length :], strict=True))
            ):
                best = place
    for place, pattern in other:
        if place < best and pattern.match(path):
            best = place
    return keys[best] if best < len(keys) else None


@cache
def _sorted(
    keys: tuple[str, ...],
) -> tuple[dict[int, list[tuple[int, bool, Pattern]]], list[tuple[int, re.Pattern[str]]]]:
    """(plain names by their length, regular expressions), each with its index in `keys`."""
    if len(keys) > MAX_PATTERNS:
        raise UsageError(f"{len(keys)} alpha patterns are too many", "lora_adapter_metadata", "The file is damaged.")
    plain: dict[int, list[tuple[int, bool, Pattern]]] = {}
    other = []
    for place, key in enumerate(keys):
        if _PLAIN.fullmatch(key):
            letters = tuple(None if x == "." else x[-1] for x in re.findall(r"\\.|.", key.removeprefix("^")))
            plain.setdefault(len(letters), []).append((place, key.startswith("^"), letters))
        else:
            other.append((place, _compiled(key)))
    return plain, other


def _compiled(key: str) -> re.Pattern[str]:
    """A regular expression that is quick to match: at most three repetitions, none of them nested. UsageError for others."""
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", key)
    if len(key) > MAX_PATTERN or len(_REPEATS.findall(bare)) > 3 or re.search(r"\)(?:[*+]|\{)", bare):
        raise UsageError(f"an alpha pattern that is too involved: {key[:60]}", "lora_adapter_metadata", "Simplify it.")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"no regular expression: {key[:60]}", "lora_adapter_metadata", "Mend the pattern.") from error
