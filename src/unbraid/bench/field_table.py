"""What a run on a user's own pictures found, as tables: a row per method, a column per score."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from unbraid.bench.field import LOWER_IS_NEARER
from unbraid.bench.results import Unit

ALL_FOUR = ("CLIP-I to content", "CLIP-I to style", "DINO to content", "DINO to style")
HARMONIC = "harmonic mean"  # of those four, as NP-LoRA reports it (arXiv 2511.11051)


@dataclass(frozen=True)
class FieldTable:
    """One task and use. `rows`: row → column → a value per cell (the mean over its drawings)."""

    task: str
    use: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Sequence[float]]]


def tables(units: Iterable[Unit]) -> list[FieldTable]:
    """By task and use, in the order of the units. Cells that a row has not finished are missing in it."""
    found: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    for unit in units:
        for use in dict.fromkeys(drawing.use for drawing in unit.drawings):
            row = found.setdefault((unit.task, use), {}).setdefault(unit.row, {})
            for name, value in cell_means(unit, use).items():
                row.setdefault(name, []).append(value)
    out = []
    for (task, use), rows in found.items():
        columns = tuple(dict.fromkeys(name for row in rows.values() for name in row))
        out.append(FieldTable(task, use, columns, rows))
    return out


def cell_means(unit: Unit, use: str) -> dict[str, float]:
    """Column → mean over a unit's drawings of one use; where CLIP and DINO both were there, with their harmonic mean."""
    scores = [drawing.scores for drawing in unit.drawings if drawing.use == use]
    means = {name: statistics.mean(one[name] for one in scores) for name in scores[0]}
    if all(name in means for name in ALL_FOUR):
        four = [means[name] for name in ALL_FOUR]
        means[HARMONIC] = statistics.harmonic_mean(four) if min(four) > 0 else 0.0
    return means


def cells(table: FieldTable) -> list[list[str]]:
    """Head and rows as text: mean ± standard error over cells; – where a row has no value."""
    head = ["", *(name + (" ↓" if nearer_is_lower(name) else "") for name in table.columns), "cells"]
    rows = []
    for name, row in table.rows.items():
        count = max((len(values) for values in row.values()), default=0)
        rows.append([name, *(_shown(row.get(column, ())) for column in table.columns), str(count)])
    return [head, *rows]


def nearer_is_lower(column: str) -> bool:
    return "diversity" not in column and any(name in column for name in LOWER_IS_NEARER)


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "–"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def markdown(units: Iterable[Unit]) -> str:
    """All tables, each under its task and use."""
    parts = []
    for table in tables(units):
        head, *rows = ["| " + " | ".join(row) + " |" for row in cells(table)]
        parts.append(
            "\n".join([f"**{table.task}: {table.use}**", "", head, "|---" * (len(table.columns) + 2) + "|", *rows])
        )
    return "\n\n".join(parts)
