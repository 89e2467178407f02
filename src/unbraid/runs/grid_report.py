"""The report of a grid: a table of every run, sheets side by side, curves, and the best settings."""

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError, suggestion
from unbraid.images import sheets
from unbraid.runs import job_folder
from unbraid.runs.folder import read_events

TABLE, SHEETS, CURVES = "runs.csv", "sheets.png", "curves.png"
SHOWN = 48  # runs on a sheet, and curves in a plot
BEST = 5  # settings that are named
SCORES = "scores.json"  # in a job folder: scores of what the run's LoRAs draw, by name
SETTING = "settings."  # in front of a setting in the table
Row = dict[str, Any]


def rows(where: Path) -> list[Row]:
    """One row for each job folder: its name and state, what was asked for, what it took, and its scores.

    Words, settings and scores have their kind in front: `words.style`, `settings.rank`, `score.content`."""
    found = list[Row]()
    for one in job_folder.folders(where):
        try:
            found.append(row(one))
        except UsageError:
            found.append({"run": one.name, "state": "damaged"})
    return found


def row(out: Path) -> Row:
    figures = job_folder.read_done(out)
    job = figures.pop("job", None) or job_folder.read_job(out)
    pictures = [Path(path).stem for some in job.get("images", {}).values() for path in some]
    made: Row = {"run": out.name, "state": job_folder.state(out)}
    made |= {name: job.get(name) for name in ("method", "base", "seed", "resolution", "schedule") if name in job}
    made |= {"pictures": " ".join(pictures), **{f"words.{name}": text for name, text in job.get("words", {}).items()}}
    made |= {f"{SETTING}{name}": value for name, value in job.get(job.get("method", ""), {}).items()}
    made |= figures
    with suppress(OSError, ValueError):
        scores = json.loads((out / SCORES).read_text("utf-8"))
        made |= {f"score.{name}": value for name, value in scores.items() if isinstance(value, int | float)}
    return made


def report(where: Path, out: Path, by: str = "") -> list[str]:
    """Write the table (also as Parquet if pyarrow is installed), the sheets and the curves into `out`.

    `by`: the column by which settings are compared, with `-` in front if less is better. Returns lines to print: the files, and
    the best settings. UsageError if there are no job folders, or no such column."""
    found = rows(where)
    lines = [str(write_table(found, out / TABLE))]
    with suppress(ImportError):
        lines.append(str(_parquet(out / TABLE)))
    names, least = (by.removeprefix("-"), by.startswith("-")) if by else _usual(found)
    best = _ranked(found, names, least) if names else []
    first = [where / name for _, _, runs in best for name in runs] or [where / one["run"] for one in found]
    done = [folder for folder in first if (folder / job_folder.DONE).exists()]
    lines += [str(file) for file in (_sheets(done, out / SHEETS), _curves(done, out / CURVES)) if file]
    for value, settings, runs in best[:BEST]:
        lines.append(f"{names} {value:.4g} (mean of {len(runs)}): {settings}")
    return lines


def write_table(found: Sequence[Row], file: Path) -> Path:
    """A CSV with one line for each row: `pandas.read_csv(file)`."""
    columns = dict.fromkeys(name for one in found for name in one)
    with atomic(file) as part, part.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, list(columns))
        writer.writeheader()
        writer.writerows(found)
    return file


def _parquet(table: Path) -> Path:
    """The same as Parquet. ImportError if pyarrow is not installed."""
    from pyarrow import csv as arrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    file = table.with_suffix(".parquet")
    with atomic(file) as part:
        parquet.write_table(arrow.read_csv(table), part)
    return file


def _usual(found: Sequence[Row]) -> tuple[str, bool]:
    """What settings are compared by if nothing is said: the judge's score, if there is one."""
    return ("score.judge", False) if any("score.judge" in one for one in found) else ("", False)


def _ranked(found: Sequence[Row], by: str, least: bool) -> list[tuple[float, str, list[str]]]:
    """(mean of the figure, settings, names of the runs) for each method with its settings, the best first."""
    numbers = dict.fromkeys(k for one in found for k, v in one.items() if isinstance(v, int | float) and v is not True)
    if by not in numbers:
        raise UsageError(f"no run has the figure {by!r}", "--by", suggestion(by, numbers))
    varied, groups = _varied(found), dict[str, list[Row]]()
    for one in found:
        if isinstance(one.get(by), int | float):
            method = str(one.get("method"))
            values = [f"{key.removeprefix(SETTING)}={one[key]}" for key in varied[method] if key in one]
            groups.setdefault(" ".join([method, *values]), []).append(one)
    ranked = [(fmean(one[by] for one in some), name, [one["run"] for one in some]) for name, some in groups.items()]
    return sorted(ranked, key=lambda one: one[0] if least else -one[0])


def _varied(found: Sequence[Row]) -> dict[str, list[str]]:
    """Method → the columns of its settings that are not the same in all of its runs."""
    seen: dict[str, dict[str, set[str]]] = {}
    for one in found:
        columns = seen.setdefault(str(one.get("method")), {})
        for key in one:
            if key.startswith(SETTING):
                columns.setdefault(key, set()).add(str(one[key]))
    return {method: [key for key, values in columns.items() if len(values) > 1] for method, columns in seen.items()}


def _sheets(folders: Sequence[Path], file: Path) -> Path | None:
    """The sheets of runs side by side; None if no run has one."""
    shown = list[tuple[str, Image.Image]]()
    for folder in folders:
        if len(shown) < SHOWN and (sheet := folder / "sheet.png").exists():
            with Image.open(sheet) as image:
                shown.append((folder.name, image.convert("RGB")))
    width = max(1, round(len(shown) ** 0.5))
    lines = [("", shown[i : i + width]) for i in range(0, len(shown), width)]
    return sheets.save_image(sheets.contact_sheet(lines, 512), file) if lines else None


def _curves(folders: Sequence[Path], file: Path) -> Path | None:
    """The losses of runs over their steps, each as a running mean; None if there are none."""
    losses = {folder.name: [one["loss"] for one in read_events(folder)] for folder in folders[:SHOWN]}
    return sheets.loss_plots({name: some for name, some in losses.items() if some}, file)
