"""What a unit of the benchmark depends on beside its settings: declared versions, the base, and the measuring instruments.

A version is a number that is raised by hand when results change. tests/test_versions.py runs everything that has one, and says
which is to be raised. So results outlive every change of the code that leaves the figures as they are.
"""

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

from unbraid.bench.truth import art, filters, judge
from unbraid.methods import METHODS

DRAWING = 1  # how a picture is drawn from a prompt and LoRAs
MERGING = 1  # the merge methods, and what else makes a LoRA file of other files
SCORING = 1  # what a drawing's scores are


def versions(methods: Iterable[str]) -> dict[str, int]:
    """Of what the rows that train these methods depend on."""
    own = {method: METHODS[method].version for method in sorted(methods)}
    return {"drawing": DRAWING, "merging": MERGING, "scoring": SCORING, "filters": filters.VERSION, **own}


@cache
def base_digest(name: str) -> str:
    """Of a base's files; of a hub id, its name."""
    folder = Path(str(files("unbraid.bases").joinpath("icons"))) if name == "icons" else Path(name)
    some = sorted(one for one in folder.rglob("*") if one.suffix in (".safetensors", ".json", ".toml", ".txt"))
    if folder.is_file():
        some = [folder]
    return _digest(some) if some else hashlib.sha256(name.encode()).hexdigest()[:12]


@cache
def truth_digest() -> str:
    """Of the judge's weights, and of the real art that is the right answer."""
    return _digest([judge.WEIGHTS, *(art.FOLDER / name for name in art.SHEETS)])


def _digest(some: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in some:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
