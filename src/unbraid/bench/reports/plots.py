"""Plots of the benchmark: content against style with confidence ellipses, likeness per problem, costs, and contact sheets."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image
from scipy import stats

from unbraid.bench.reports.stats import problems
from unbraid.bench.reports.tables import SANITY, order
from unbraid.bench.results import Drawing, Unit
from unbraid.bench.rows.row import CEILING
from unbraid.bench.truth.truths import Truth
from unbraid.common.atomic import atomic
from unbraid.images import sheets

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
CELL, COLUMNS = 64, 12  # of contact sheets


def save(figure: Figure, path: Path) -> Path:
    with atomic(path) as part:
        figure.savefig(part, dpi=110)
    return path


def scatter(units: Iterable[Unit], task: str, path: Path) -> Path:
    """Content against style: a point per row, with the 95 % confidence ellipse of its mean over problems. Better rows are further up and
    right. The ceiling is left out, because it is far away from all others."""
    found = {row: values for row, values in problems(units, task).items() if row != CEILING}
    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(order(found)):
        points = np.array([(one["content"], one["style"]) for one in found[row].values()])
        colour = "#333333" if row in SANITY else COLOURS[i % len(COLOURS)]
        marker = "s" if row in SANITY else "oD^v"[i // len(COLOURS) % 4]
        axes.plot(*points.mean(0), marker, color=colour, markersize=7, label=row)
        _ellipse(axes, points, colour)
    axes.set(xlabel="content: cosine to the true picture", ylabel="style: cosine to the true picture", title=task)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=7.5, frameon=False)
    return save(figure, path)


def _ellipse(axes: Axes, points: np.ndarray, colour: str) -> None:
    """Draw the 95 % confidence region of the mean of `points [n, 2]` (Hotelling's T²); nothing for fewer than four points."""
    n = len(points)
    if n < 4:
        return
    values, vectors = np.linalg.eigh(np.cov(points.T) / n)
    size = stats.f.ppf(0.95, 2, n - 2) * 2 * (n - 1) / (n - 2)
    width, height = 2 * np.sqrt(np.maximum(values, 0) * size)
    angle = np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0]))
    axes.add_patch(Ellipse(tuple(points.mean(0)), width, height, angle=angle, color=colour, alpha=0.12, lw=0))


def by_problem(units: Iterable[Unit], task: str, path: Path) -> Path:
    """Likeness of every row on every problem, which shows where each fails."""
    found = problems(units, task)
    rows = order(found)
    names = list(dict.fromkeys(problem for row in rows for problem in found[row]))
    grid = np.array([[found[row][one]["likeness"] if one in found[row] else np.nan for one in names] for row in rows])
    figure = Figure(figsize=(5 + 0.28 * len(names), 1.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    figure.colorbar(image, ax=axes, label="likeness", shrink=0.8)
    return save(figure, path)


def costs(units: Iterable[Unit], task: str, path: Path) -> Path:
    """Seconds, FLOPs and file size of every row, side by side."""
    some = [unit for unit in units if unit.task == task]
    rows = [row for row in reversed(order(problems(some, task))) if row not in SANITY]
    means: dict[str, Mapping[str, float]] = {}
    for row in rows:
        mine = [unit.cost for unit in some if unit.row == row]
        means[row] = {
            "seconds": float(np.mean([one.seconds for one in mine])),
            "TFLOP": float(np.mean([one.flops for one in mine])) / 1e12,
            "file, MB": float(np.mean([one.file for one in mine])) / 1e6,
        }
    figure = Figure(figsize=(10, 1 + 0.26 * max(len(rows), 2)), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3, sharey=True), ("seconds", "TFLOP", "file, MB"), strict=True):
        axes.barh(rows, [means[row][name] for row in rows], color=COLOURS[0])
        axes.set_xlabel(name)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(labelsize=8)
    return save(figure, path)


def sheet(units: Iterable[Unit], task: str, work: Path, path: Path) -> Path | None:
    """A contact sheet: the true pictures in the first line, then a line per row of the benchmark; a column per problem. It shows the lowest
    seed that has pictures. None if there are no pictures."""
    some = [unit for unit in units if unit.task == task]
    kept = [unit for unit in some if all((work / drawing.file).exists() for drawing in unit.drawings)]
    if not kept:
        return None
    first = min(unit.seed for unit in kept)
    drawn: dict[str, dict[tuple[str, str], Drawing]] = {}
    for unit in (unit for unit in kept if unit.seed == first):
        for drawing in _shown(unit):
            drawn.setdefault(unit.row, {}).setdefault((unit.cell, _label(unit, drawing)), drawing)
    columns = list(dict.fromkeys(place for row in drawn.values() for place in row))[:COLUMNS]
    sample = {place: next(row[place] for row in drawn.values() if place in row) for place in columns}
    truths = [(place[1], Truth(one.subject, one.style).image) for place, one in sample.items()]
    rows: list[tuple[str, Sequence[tuple[str, Image.Image]]]] = [("what the artists drew", truths)]
    for name in order(problems(some, task)):
        cells = [(work / drawn[name][place].file) if place in drawn.get(name, {}) else None for place in columns]
        rows.append((name, [("", Image.open(file) if file else Image.new("RGB", (8, 8), "#eeeeee")) for file in cells]))
    return sheets.save_image(sheets.contact_sheet(rows, cell=CELL), path)


def _shown(unit: Unit) -> list[Drawing]:
    """The drawings of a unit that go on a sheet: one of each use for `separate`, else all."""
    if unit.task == "separate":
        return [
            next(one for one in unit.drawings if one.use == use) for use in dict.fromkeys(d.use for d in unit.drawings)
        ]
    return list(unit.drawings)


def _label(unit: Unit, drawing: Drawing) -> str:
    return (f"{drawing.use}: " if unit.task == "separate" else "") + f"{drawing.subject}, {drawing.style}"
