"""Figures that papers report, as data (published.toml) and as tables. They are comparable neither between tables nor with figures of
unbraid: pictures, prompts, measuring models and preprocessing differ."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from unbraid.common.atomic import read_toml

Evidence = Literal["paper", "secondary", "authors"]
READ = {
    "paper": "read in the paper",
    "secondary": "from a note about the paper, not checked against it",
    "authors": "from the authors' pages",
}
WARNING = "Published figures, each under its own paper's protocol: not comparable with another table, nor with figures measured here."


@dataclass(frozen=True)
class Table:
    """One table of a paper. `rows`: method → a value per column, NaN if the paper gives none."""

    paper: str
    source: str  # where to find it: arXiv id or venue
    title: str
    evidence: Evidence
    protocol: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]


class Value(NamedTuple):
    """One published number."""

    paper: str
    source: str
    table: str
    method: str
    metric: str
    value: float
    protocol: str


@cache
def published() -> tuple[Table, ...]:
    """All tables, in the order of the file."""
    path = Path(str(files("unbraid.bench.reports").joinpath("published.toml")))
    return tuple(_table(**entry) for entry in read_toml(path, "Install unbraid again.")["table"])


def _table(*, columns: list[str], rows: list[list[Any]], evidence: Any, **rest: str) -> Table:
    if evidence not in get_args(Evidence):
        raise ValueError(f"{rest}: evidence {evidence!r}")
    values = {str(name): tuple(float(value) for value in row) for name, *row in rows}
    for name, row in values.items():
        if len(row) != len(columns):
            raise ValueError(f"{rest}: {name} has {len(row)} values for {len(columns)} columns")
    return Table(**rest, evidence=evidence, columns=tuple(columns), rows=values)


def values(method: str | None = None) -> Iterator[Value]:
    """All published numbers, or those of one method under the name that the paper uses."""
    for table in published():
        for name, row in table.rows.items():
            for metric, value in zip(table.columns, row, strict=True):
                if method in (None, name) and not math.isnan(value):
                    yield Value(table.paper, table.source, table.title, name, metric, value, table.protocol)


def cells(table: Table) -> list[list[str]]:
    """The table as text, headings first. All values of a column have the same number of decimals; – stands for no value."""
    digits = [max(_decimals(row[i]) for row in table.rows.values()) for i in range(len(table.columns))]
    rows = [
        [name, *("–" if math.isnan(value) else f"{value:.{n}f}" for value, n in zip(row, digits, strict=True))]
        for name, row in table.rows.items()
    ]
    return [["", *table.columns], *rows]


def _decimals(value: float) -> int:
    return 0 if math.isnan(value) or value == round(value) else len(repr(value).partition(".")[2])


def caption(table: Table) -> str:
    return f"{table.paper}, {table.title} ({table.source}; {READ[table.evidence]}). {table.protocol}"


def markdown(tables: Sequence[Table] | None = None) -> str:
    """Tables as Markdown, each with its caption, below a warning."""
    parts = [f"*{WARNING}*"]
    for table in tables if tables is not None else published():
        head, *rows = ["| " + " | ".join(row) + " |" for row in cells(table)]
        parts.append("\n".join([f"**{caption(table)}**", "", head, "|---" * (len(table.columns) + 1) + "|", *rows]))
    return "\n\n".join(parts)
