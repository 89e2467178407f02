"""What the results of the benchmark depend on besides settings: declared versions, the base, the judge and the real art.

A version is a number that is raised by hand when results change. tests/test_versions.py runs everything that has a version, and
fails with the name of the one to raise. A change of the code that leaves the figures alone keeps all earlier results valid.
"""

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

from unbraid.bench.truth import art, filters, judge
from unbraid.methods import METHODS

DRAWING = 1  # how a picture is drawn from a prompt and LoRAs
MERGING = 1  # how LoRA files are made from other files: the merge methods, `join`
SCORING = 1  # how a drawing is scored


def versions(methods: Iterable[str]) -> dict[str, int]:
    """Name → version of everything that a row which trains these methods depends on."""
    own = {method: METHODS[method].version for method in sorted(methods)}
    return {"drawing": DRAWING, "merging": MERGING, "scoring": SCORING, "filters": filters.VERSION, **own}


@cache
def base_digest(name: str) -> str:
    """A hash of the base's files, or of its name if it is a hub id."""
    folder = Path(str(files("unbraid.bases").joinpath("icons"))) if name == "icons" else Path(name)
    some = sorted(one for one in folder.rglob("*") if one.suffix in (".safetensors", ".json", ".toml", ".txt"))
    if folder.is_file():
        some = [folder]
    return _digest(some) if some else hashlib.sha256(name.encode()).hexdigest()[:12]


@cache
def truth_digest() -> str:
    """A hash of the judge's weights and of the real art that drawings are compared with."""
    return _digest([judge.WEIGHTS, *(art.FOLDER / name for name in art.SHEETS)])


def _digest(some: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in some:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
