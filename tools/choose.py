"""Choose a method's settings on a base, one setting after the other, on pictures that the benchmark does not use.

    python -m tools.choose --work DIR unziplora            # all settings of the method's search
    python -m tools.choose --work DIR --base FOLDER pair --set rank=8,16

Each trial is a small benchmark: it trains on four pictures, draws, and lets the judge score. A setting keeps the value with the best
mean likeness; a value must be better than the present one by more than the standard error of the paired difference to replace it.
What was tried stands in DIR/trials.jsonl; a killed run goes on where it was, because finished units are kept.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from unbraid.bench.grid import Todo, plan, run
from unbraid.bench.registry import all_rows
from unbraid.bench.reports.stats import problems
from unbraid.bench.rows.row import Row
from unbraid.bench.truth.tasks import Scale, Task
from unbraid.common.errors import UsageError
from unbraid.runs.settings import Settings

# Held out from the training of base and judge, and not in the benchmark's tasks (a test compares).
SUBJECTS = ("owl", "crab", "lion", "house")
STYLES = ("line art", "stencil", "pencil")


@dataclass(frozen=True)
class Search:
    """What is tried for a method: the benchmark's row that shows it, and setting → values, in the order of the search."""

    task: Task
    row: str
    values: Mapping[str, tuple[Any, ...]]


IDEAS = {  # of both `split` and `pair`, off by default; CRAFT's parts are 0-0.7 and 0.28-1
    "loss": ("x0",),
    "prior_weight": (0.1, 0.5),
    "content_part": ("0-0.7", "0-0.85"),
    "style_part": ("0.28-1", "0.14-1"),
}
SEARCHES = {
    "unziplora": Search(
        "separate",
        "UnZipLoRA",
        {
            "style_lr": (1e-3, 2e-3, 4e-3),
            "content_lr": (5e-4, 1e-3, 2e-3),
            "steps": (200, 300, 450),
            "rank": (4, 8, 16, 32, 64),
            "column_ratio": (0.1, 0.2, 0.3),  # of three periods: at most a third
            "content_alone": (0.0, 0.5, 1.0),
            **IDEAS,
            "leak_weight": (0.1, 1.0),
            "style_steps": (75, 150, 300),
        },
    ),
    "dreambooth": Search(
        "separate", "DreamBooth-LoRA", {"lr": (5e-4, 1e-3, 2e-3, 4e-3), "steps": (200, 300, 450), "rank": (8, 16, 32)}
    ),
    "blora": Search("separate", "B-LoRA", {"lr": (1e-3, 2e-3, 4e-3), "steps": (200, 300, 450), "rank": (8, 16, 32)}),
    "consislora": Search(
        "separate",
        "ConsisLoRA",
        {"lr": (1e-3, 2e-3, 4e-3), "x0_lr": (5e-4, 1e-3, 2e-3), "noise_offset": (0.0, 0.03, 0.1)},
    ),
    "ziplora": Search(
        "combine",
        "ZipLoRA",
        {"lr": (1e-3, 3e-3, 1e-2), "steps": (50, 100, 200), "layer_prior": (0.03, 0.1, 0.3)},
    ),
    "pair": Search(
        "transfer",
        "Pair",
        {
            "lr": (1e-3, 3e-3, 6e-3),
            "steps": (200, 300, 450),
            "style_from": (50, 100, 150),
            "rank": (4, 8, 16, 32, 64),
            **IDEAS,
        },
    ),
    "break": Search("combine", "Break-for-Make, at once", {"lr": (2e-3, 5e-3, 1e-2), "steps": (200, 300, 450)}),
    "make": Search("combine", "Break-for-Make, fine-tuned", {"lr": (5e-4, 1e-3, 2e-3)}),
}

app = typer.Typer(add_completion=False, help=__doc__)


def todos(work: Path, row: Row, settings: Mapping[str, Settings], base: str) -> list[Todo]:
    """One problem for each subject, each in one style; `transfer` has one for each style."""
    return plan(work, Scale(SUBJECTS, STYLES, others=8, draws=1, training=settings), [row], base)


def likeness(work: Path, row: Row, settings: Mapping[str, Settings], base: str) -> dict[str, float]:
    """Problem → likeness, with these settings of the methods."""
    done = [one for one in run(todos(work, row, settings, base)) if not one.held]
    failed = [one.error for one in done if one.unit is None]
    if failed:
        raise UsageError(failed[0], row.name, "Leave out the value that was tried last.")
    found = problems([one.unit for one in done if one.unit], row.task)[row.name]
    return {problem: values["likeness"] for problem, values in found.items()}


def better(new: Mapping[str, float], old: Mapping[str, float]) -> bool:
    """Whether `new` is ahead on the same problems, by more than the standard error of the difference."""
    ahead = [new[problem] - old[problem] for problem in old]
    error = statistics.stdev(ahead) / math.sqrt(len(ahead)) if len(ahead) > 1 else 0.0
    return statistics.mean(ahead) > error


def choose(work: Path, method: str, search: Search, base: str) -> Iterator[dict[str, Any]]:
    """Every trial: what was set, its mean likeness, and whether it was kept. The first has the base's own settings."""
    row = next(one for one in all_rows() if (one.task, one.name) == (search.task, search.row))
    kept: dict[str, Any] = {}
    best = likeness(work, row, {}, base)
    yield {"method": method, "settings": {}, "likeness": statistics.mean(best.values()), "kept": True}
    for name, values in search.values.items():
        for value in values:
            tried = {**kept, name: value}
            found = likeness(work, row, {method: tried}, base)
            keep = better(found, best)
            yield {"method": method, "settings": tried, "likeness": statistics.mean(found.values()), "kept": keep}
            if keep:
                kept, best = tried, found


@app.command()
def main(
    method: Annotated[str, typer.Argument(help=f"One of: {', '.join(SEARCHES)}.")],
    work: Annotated[Path, typer.Option(help="Folder for trainings, drawings and trials; reuse it to resume.")],
    base: Annotated[str, typer.Option(help="The base: icons, or a folder.")] = "icons",
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE,VALUE: search these alone.")] = None,
) -> None:
    """Print and record every trial, and the settings that were kept, as the base's unbraid.toml has them."""
    torch.set_num_threads(1)
    search = SEARCHES[method]
    if set_:
        pairs = (one.split("=", 1) for one in set_)
        values = {name: tuple(json.loads(value) for value in text.split(",")) for name, text in pairs}
        search = Search(search.task, search.row, values)
    kept: dict[str, Any] = {}
    work.mkdir(parents=True, exist_ok=True)
    with (work / "trials.jsonl").open("a") as log:
        for trial in choose(work, method, search, base):
            print(f"{trial['likeness']:.4f} {'kept' if trial['kept'] else '    '} {trial['settings']}", flush=True)
            log.write(json.dumps(trial) + "\n")
            log.flush()
            kept = trial["settings"] if trial["kept"] else kept
    print(f"[{method}]", *(f"{name} = {value}" for name, value in kept.items()), sep="\n")


if __name__ == "__main__":
    app()
