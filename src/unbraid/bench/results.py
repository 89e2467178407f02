"""What a benchmark leaves: one unit for every row on every cell, in a file of its own and, to be kept and shared, a line each."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unbraid.bench.cost import Cost
from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError


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
    """One row on one cell. `made`: digests of the base, and of judge and art."""

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
    """The units of a file, one to a line."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot be read", file, "Give a results.jsonl of `unbraid bench`.") from error
    units = []
    for i, line in enumerate(lines):
        try:
            units.append(_unit(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"is no unit of a benchmark ({error})", f"{file}, line {i + 1}", "Delete it and run again."
            ) from error
    return units


def collect(work: Path) -> list[Unit]:
    """All units of a benchmark's folder."""
    return [unit for file in sorted((work / "units").glob("*/unit.json")) for unit in read(file)]


def wanted(units: Iterable[Unit], planned: Mapping[str, tuple[str, str, str]]) -> list[Unit]:
    """One unit for every (task, row, cell) that is planned, by key, and there: the one of this key, else another's."""
    found: dict[tuple[str, str, str], Unit] = {}
    for unit in units:
        place = (unit.task, unit.row, unit.cell)
        if place not in found or unit.key in planned:
            found[place] = unit
    return [found[place] for place in planned.values() if place in found]


def complete(units: Sequence[Unit], rows: Mapping[str, set[str]]) -> list[Unit]:
    """The units of cells that every row (task → names) has done, so that rows are compared on the same problems; of a task without
    such a cell, all."""
    done: dict[tuple[str, str], set[str]] = {}
    for unit in units:
        done.setdefault((unit.task, unit.cell), set()).add(unit.row)
    whole = {place for place, names in done.items() if names >= rows[place[0]]}
    tasks = {task for task, _ in whole}
    return [unit for unit in units if (unit.task, unit.cell) in whole or unit.task not in tasks]


def save(units: Iterable[Unit], file: Path) -> Path:
    """All units in one file; figures to four places."""
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


def _unit(told: dict[str, Any]) -> Unit:
    drawings = tuple(Drawing(**one) for one in told.pop("drawings"))
    return Unit(drawings=drawings, cost=Cost(**told.pop("cost")), **told)
