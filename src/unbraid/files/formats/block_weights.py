"""Block weights: LBW vectors by length, single blocks by name, anything by regular expression. Pure Python.

"OUT01=0.3"            one block          "IN=0.5"        all blocks whose names start with it
"text_encoder=0"       one component      "attn2=0.8"     any regular expression on the module's path
"1,0,0,0,1,1,…"        a vector: 12 or 20 numbers for SDXL, 17 or 26 for SD1.5
"""

import re
from collections.abc import Iterable, Mapping

from unbraid.common.errors import UsageError
from unbraid.files.formats.blocks import Family, block_of


def _names(ins: Iterable[int], outs: Iterable[int]) -> tuple[str, ...]:
    return ("BASE", *(f"IN{i:02d}" for i in ins), "MID", *(f"OUT{i:02d}" for i in outs))


VECTORS: dict[str, dict[int, tuple[str, ...]]] = {
    "sdxl": {12: _names((4, 5, 7, 8), range(6)), 20: _names(range(9), range(9))},
    "sd15": {17: _names((1, 2, 4, 5, 7, 8), range(3, 12)), 26: _names(range(12), range(12))},
}


def block_weights(modules: Iterable[str], rules: Iterable[str], family: Family) -> dict[str, float]:
    """Module → weight. It is 1 without a rule; if several rules match a module, the last one counts.

    Errors: a rule that is neither `NAME=NUMBER` nor a vector, a name that matches no module, a vector of an unknown length.
    """
    weights = dict.fromkeys(modules, 1.0)
    for rule in rules:
        if "," in rule and "=" not in rule:
            _vector(weights, rule, family)
            continue
        for one in re.split(r",(?=[^,]*=)", rule):
            _named(weights, one.strip())
    return weights


def _named(weights: dict[str, float], rule: str) -> None:
    name, equals, value = rule.rpartition("=")
    if not equals or not name:
        raise UsageError("not a block rule", rule, "Give NAME=NUMBER, such as OUT01=0.3, or a vector of numbers.")
    weight = number(value, rule)
    hits = _hits(weights, name)
    if not hits:
        there = ", ".join(sorted({block_of(module) for module in weights}))
        raise UsageError(f"{name!r} fits no module", rule, f"The LoRA has the blocks {there}.")
    for module in hits:
        weights[module] = weight


def _hits(modules: Mapping[str, float], name: str) -> list[str]:
    if re.fullmatch(r"(IN|OUT|MID|BASE)\d*", name, re.IGNORECASE):
        return [module for module in modules if block_of(module).startswith(name.upper())]
    if re.fullmatch(r"unet|transformer|text_encoder(_[23])?", name):
        return [module for module in modules if module.startswith(name + ".")]
    try:
        pattern = re.compile(name)
    except re.error as error:
        raise UsageError(f"not a regular expression ({error})", name, "Give a block's name such as OUT01.") from error
    return [module for module in modules if pattern.search(module)]


def _vector(weights: dict[str, float], rule: str, family: Family) -> None:
    numbers = [number(part, rule) for part in rule.split(",")]
    known = VECTORS.get(family, {})
    names = known.get(len(numbers))
    if names is None:
        lengths = " or ".join(map(str, known)) or "no vector"
        fix = f"For {family} give {lengths} numbers, or NAME=NUMBER."
        raise UsageError(f"a vector of {len(numbers)} numbers", rule, fix)
    table = dict(zip(names, numbers, strict=True))
    for module in weights:
        block = block_of(module)
        if block not in table:
            fix = f"Give {max(known)} numbers."
            raise UsageError(f"the LoRA has {block}, which a vector of {len(numbers)} does not name", rule, fix)
        weights[module] = table[block]


def number(text: str, where: str) -> float:
    """A finite number, or a `UsageError`."""
    try:
        number = float(text)
    except ValueError as error:
        raise UsageError(f"{text.strip()!r} is not a number", where, "Give a number such as 0.7.") from error
    if number - number != 0:
        raise UsageError(f"{text.strip()} is not a weight", where, "Give a finite number.")
    return number
