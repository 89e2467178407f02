"""The report of a run on a user's own pictures: tables with a row per method and a column per score, and contact sheets."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unbraid.bench.field.protocol import Protocol
from unbraid.bench.field.scores import LOWER_IS_NEARER
from unbraid.bench.reports import published
from unbraid.bench.results import Drawing, Unit, save
from unbraid.common.atomic import atomic
from unbraid.images import sheets
from unbraid.images.crop import open_image

ALL_FOUR = ("CLIP-I to content", "CLIP-I to style", "DINO to content", "DINO to style")
SHOWN = 8  # drawings in a row of a sheet
HARMONIC = "harmonic mean"  # of the four above, as NP-LoRA reports it (arXiv 2511.11051)


@dataclass(frozen=True)
class FieldTable:
    """The scores of one task and use. `rows`: row → column → one value per cell, the mean over its drawings."""

    task: str
    use: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Sequence[float]]]


def tables(units: Iterable[Unit]) -> list[FieldTable]:
    """One table per task and use, in the order of the units. A row has values for the cells that it has finished."""
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
    """Column → mean over a unit's drawings of one use, and the harmonic mean if both CLIP and DINO measured them."""
    scores = [drawing.scores for drawing in unit.drawings if drawing.use == use]
    means = {name: statistics.mean(one[name] for one in scores) for name in scores[0]}
    if all(name in means for name in ALL_FOUR):
        four = [means[name] for name in ALL_FOUR]
        means[HARMONIC] = statistics.harmonic_mean(four) if min(four) > 0 else 0.0
    return means


def cells(table: FieldTable) -> list[list[str]]:
    """The table as text, headings first: mean ± standard error over cells, or – without a value."""
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
    """All tables as Markdown, each with its task and use above."""
    parts = []
    for table in tables(units):
        head, *rows = ["| " + " | ".join(row) + " |" for row in cells(table)]
        parts.append(
            "\n".join([f"**{table.task}: {table.use}**", "", head, "|---" * (len(table.columns) + 2) + "|", *rows])
        )
    return "\n\n".join(parts)


def write(units: Sequence[Unit], rules: Protocol, work: Path, out: Path) -> list[Path]:
    """Write into `out`: table.md with the models, the protocol and published figures; results.jsonl; a contact sheet per cell."""
    models = {pair for unit in units for pair in json.loads(unit.made["models"]).items()}
    parts = [
        "Measured with " + "; ".join(f"{label}: {name}" for label, name in sorted(models)) + ".",
        f"Protocol: {rules.source}. {rules.draws} pictures per prompt and seed, {rules.steps} steps, guidance {rules.guidance:g}. {rules.note}",
        "Means over cells ± standard error; ↓: lower is nearer. Nearer is not always better: a copy of the input is nearest of all.",
        markdown(units),
        "## What papers report",
        published.markdown(),
    ]
    with atomic(out / "table.md") as part:
        part.write_text("\n\n".join(parts) + "\n", "utf-8")
    return [out / "table.md", save(units, out / "results.jsonl"), *contact_sheets(units, work, out)]


def contact_sheets(units: Sequence[Unit], work: Path, out: Path) -> list[Path]:
    """A contact sheet per cell, with a row per method."""
    files = []
    for i, (task, cell) in enumerate(dict.fromkeys((unit.task, unit.cell) for unit in units)):
        rows = [(unit.row, _shown_of(unit.drawings, work)) for unit in units if (unit.task, unit.cell) == (task, cell)]
        titled = [(f"{task}: {cell}. {rows[0][0]}", rows[0][1]), *rows[1:]]
        files.append(sheets.save_image(sheets.contact_sheet(titled), out / f"{task}-{i:03d}.webp"))
    return files


def _shown_of(drawings: Sequence[Drawing], work: Path) -> list[tuple[str, Image.Image]]:
    """The first drawings of every prompt, equally many of each."""
    prompts = dict.fromkeys(drawing.prompt for drawing in drawings)
    each = max(1, SHOWN // max(1, len(prompts)))
    some = [one for prompt in prompts for one in [one for one in drawings if one.prompt == prompt][:each]]
    return [(one.prompt, open_image(work / one.file)) for one in some]
