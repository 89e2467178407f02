"""The file of a grid: pictures, methods, settings and seeds, and their product as jobs."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from unbraid.cli.batch import job_of
from unbraid.common.atomic import read_toml
from unbraid.common.errors import UsageError, suggestion

EXAMPLE = """\
verb = "split"                        # any training verb
style = "line art"                    # options for all runs, as on its command line
methods = ["unziplora", "blora"]
seeds = [0, 1]

[[pictures]]                          # one table each: the options in which they differ
image = "fox.png"
subject = "fox"

[[pictures]]
image = "owl.png"
subject = "owl"

[settings]                            # --set of all methods: a list gives a run for each value
rank = [16, 64]

[settings.unziplora]                  # of one method
column_ratio = [0.1, 0.2]
"""
FIX = "`unbraid grid --help` has an example."
AXES = {"method": "methods", "seed": "seeds", "set": "settings", "picture": "pictures"}
MOST = 100_000  # runs: more are a mistake


@dataclass(frozen=True)
class Planned:
    """A run of a grid: the name of its folder, and its table, as in a batch file."""

    name: str
    table: Mapping[str, Any]


def read(file: Path) -> tuple[Path, list[Planned]]:
    """The folder of the grid (`out`, by default grids/NAME) and its runs, seed by seed. UsageError if the file is wrong."""
    table = read_toml(file, f"Give a TOML file or a folder of job folders. {FIX}")
    out = table.pop("out", str(Path("grids") / file.stem))
    pictures, settings = table.pop("pictures", None), table.pop("settings", {})
    if not isinstance(pictures, list) or not pictures or not all(isinstance(one, dict) and one for one in pictures):
        raise UsageError("there are no pictures in it", file, "One table per picture: [[pictures]].")
    methods, seeds = (_axis(table, name, kind, file) for name, kind in (("methods", str), ("seeds", int)))
    if not isinstance(out, str) or not isinstance(settings, dict):
        raise UsageError("`out` is a text and `settings` a table", file, FIX)
    for where in (table, *pictures):
        for key in sorted(where.keys() & (AXES.keys() | {"out"})):
            raise UsageError(
                f"{key!r} is not for a single run here", file, f"Give {AXES.get(key, 'out')!r} at the top."
            )
    if unknown := [key for key, value in settings.items() if isinstance(value, dict) and key not in methods]:
        fix = suggestion(unknown[0], methods) if methods else "List it under `methods`."
        raise UsageError(f"settings of {unknown[0]!r}, which is none of the methods", file, fix)
    own = [(method, some) for method in methods or [""] for some in combinations(settings, method)]
    if len(seeds) * len(pictures) * len(own) > MOST:
        raise UsageError(f"more than {MOST} runs", file, "Make several grids of it.")
    runs = [
        _planned(table | picture, method, some, seed) for seed, picture, (method, some) in product(seeds, pictures, own)
    ]
    if twice := len(runs) - len({run.name for run in runs}):
        raise UsageError(f"{twice} runs come twice", file, "Give every picture, method, value and seed once.")
    return Path(out), runs


def _axis(table: dict[str, Any], name: str, kind: type, file: Path) -> list[Any]:
    values = table.pop(name, [] if kind is str else [0])
    if not isinstance(values, list) or any(type(one) is not kind for one in values) or (kind is int and not values):
        example = '["unziplora"]' if kind is str else "[0, 1]"
        raise UsageError(
            f"{name!r} is no list of {'names' if kind is str else 'numbers'}", file, f"Such as {name} = {example}."
        )
    return values


def combinations(settings: Mapping[str, Any], method: str) -> Iterator[dict[str, Any]]:
    """Every combination of the values of a method's settings: those of all methods, then its own."""
    common = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    given = common | settings.get(method, {})
    axes = [value if isinstance(value, list) else [value] for value in given.values()]
    yield from (dict(zip(given, values, strict=True)) for values in product(*axes))


def _planned(table: Mapping[str, Any], method: str, settings: Mapping[str, Any], seed: int) -> Planned:
    """A run with its name: words to recognise it by, and a hash of everything that was given, so that equal runs have equal names."""
    made = {**table, **({"method": method} if method else {}), "seed": seed, "set": dict(settings)}
    digest = hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return Planned(
        _slug([*_labels(table), method, *(f"{k}={v}" for k, v in settings.items()), f"s{seed}"], digest), made
    )


def _labels(table: Mapping[str, Any]) -> Iterator[str]:
    """What a picture is called: its subject, or else the names of its files."""
    if isinstance(table.get("subject"), str):
        yield table["subject"]
        return
    for name in ("image", "images", "before", "content", "style", "prompt"):
        value = table.get(name)
        some = value if isinstance(value, list) else [value] if value else []
        yield from (Path(str(one)).stem for one in some[:1])


def _slug(words: Sequence[str], digest: str) -> str:
    text = re.sub(r"[^A-Za-z0-9=.]+", "-", " ".join(word for word in words if word)).strip("-.")
    return f"{text[:80]}-{digest}".lstrip("-")


def job(run: Planned, out: Path, file: Path) -> Any:
    """The job of a planned run, in its folder. UsageError if a value is wrong."""
    return job_of({**run.table, "out": str(out / run.name)}, run.table.keys(), f"{file}, {run.name}")
