"""Results of the benchmark: one unit for each row on each cell. Each is stored in its own file; `results.jsonl` has all, one a line."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unbraid.bench.rows.cost import Cost
from unbraid.common.atomic import atomic
from unbraid.common.contents import TEXT, mismatch
from unbraid.common.errors import UsageError

UNIT = "unit.json"  # the name of a unit's own file
GIVEN, MADE = "Give a results.jsonl of `unbraid bench`.", "Delete it and run again."


@dataclass(frozen=True)
class Drawing:
    """One picture and its scores; `file` is relative to the benchmark's folder."""

    use: str
    prompt: str
    subject: str
    style: str
    seed: int
    file: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Unit:
    """One row on one cell. `made`: `base` and `truth` → their digests, or `models` → the measuring models of a user's own pictures."""

    key: str
    task: str
    row: str
    cell: str
    seed: int
    drawings: tuple[Drawing, ...]
    diversity: float | None
    cost: Cost
    made: Mapping[str, str]


def write(unit: Unit, file: Path) -> None:
    with atomic(file) as part:
        part.write_text(to_json(unit) + "\n")


def read(file: Path) -> list[Unit]:
    """The units of a file, one per line. UsageError for a file that cannot be read, and for a line that is not a unit."""
    if other := mismatch(file, "a results.jsonl", (TEXT,)):
        raise UsageError(other, file, GIVEN)
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot be read", file, GIVEN) from error
    units = []
    for i, line in enumerate(lines):
        try:
            units.append(parsed(line))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"is no unit of a benchmark ({error})", f"{file}, line {i + 1}", MADE if file.name == UNIT else GIVEN
            ) from error
    return units


def collect(work: Path) -> list[Unit]:
    """All finished units in a benchmark's folder."""
    return [unit for file in sorted((work / "units").glob(f"*/{UNIT}")) for unit in read(file)]


def wanted(units: Iterable[Unit], planned: Mapping[str, tuple[str, str, str]]) -> list[Unit]:
    """The units that belong to a plan, given as key → (task, row, cell), at most one per entry: the unit with that key, else one of the
    same task, row and cell that was made with other settings or versions."""
    found: dict[tuple[str, str, str], Unit] = {}
    for unit in units:
        entry = (unit.task, unit.row, unit.cell)
        if entry not in found or unit.key in planned:
            found[entry] = unit
    return [found[entry] for entry in planned.values() if entry in found]


def complete(units: Sequence[Unit]) -> list[Unit]:
    """The units of the cells that every row of their task has finished, so that rows are compared on the same problems. A row without any
    unit does not count. If a task has no such cell, all its units are returned."""
    rows: dict[str, set[str]] = {}
    done: dict[tuple[str, str], set[str]] = {}
    for unit in units:
        rows.setdefault(unit.task, set()).add(unit.row)
        done.setdefault((unit.task, unit.cell), set()).add(unit.row)
    finished = {cell for cell, names in done.items() if names == rows[cell[0]]}
    tasks = {task for task, _ in finished}
    return [unit for unit in units if (unit.task, unit.cell) in finished or unit.task not in tasks]


def save(units: Iterable[Unit], file: Path) -> Path:
    """Write all units into one file, figures rounded to four decimals."""
    with atomic(file) as part:
        part.write_text("".join(to_json(unit) + "\n" for unit in units))
    return file


def to_json(unit: Unit) -> str:
    return json.dumps(_rounded(asdict(unit)), separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def parsed(line: str) -> Unit:
    """A unit from `to_json`. ValueError, KeyError or TypeError if it is none."""
    fields: dict[str, Any] = json.loads(line)
    drawings = tuple(Drawing(**one) for one in fields.pop("drawings"))
    return Unit(drawings=drawings, cost=Cost(**fields.pop("cost")), **fields)
