"""Compare rows of *recombine* on pictures that the benchmark does not use: four subjects, each in another style, make twelve ordered pairs.

    python -m tools.pairs --work DIR UnZipLoRA "ablation: UnZipLoRA, own prompts"

Four trainings serve all pairs, so a way to draw costs seconds, and a setting of training costs minutes. Prints every row's means, and
its lead over the first row with the standard error of the paired difference (the pairs share pictures, so it is a little too small).
A killed run goes on where it was.
"""

import math
import statistics
from itertools import permutations
from pathlib import Path
from typing import Annotated

import torch
import typer

from tools.choose import SUBJECTS
from unbraid.bench.grid import Todo, run
from unbraid.bench.registry import chosen
from unbraid.bench.reports.stats import problems
from unbraid.bench.truth.tasks import STYLES, Cell, Scale
from unbraid.bench.truth.truths import Truth
from unbraid.common.errors import UsageError

SCALE = Scale(SUBJECTS, STYLES, draws=1)
SCORES = ("likeness", "content", "style", "leak")

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    rows: Annotated[list[str], typer.Argument(help="Names of rows; `unbraid bench --only list` prints all.")],
    work: Annotated[Path, typer.Option(help="Folder for trainings and drawings; reuse it to resume.")],
    base: Annotated[str, typer.Option(help="The base: icons, or a folder.")] = "icons",
) -> None:
    """Draw each row on each pair, and print how they compare."""
    torch.set_num_threads(1)
    names = [row.name for name in rows for row in chosen(("recombine",), (name,))]
    pictures = [Truth(subject, style) for subject, style in zip(SUBJECTS, STYLES, strict=True)]
    cells = [Cell("recombine", content, style, 0) for content, style in permutations(pictures, 2)]
    done = [
        one for one in run([Todo(work, SCALE, base, name, cell) for name in names for cell in cells]) if not one.held
    ]
    for failed in (one for one in done if one.unit is None):
        raise UsageError(failed.error, failed.todo.row, "Leave out this row.")
    found = problems([one.unit for one in done if one.unit], "recombine")
    for name in names:
        mine, first = found[name], found[names[0]]
        print(name, *(f"{score} {statistics.mean(one[score] for one in mine.values()):.3f}" for score in SCORES))
        if name != names[0]:
            ahead = {score: [mine[pair][score] - first[pair][score] for pair in mine] for score in ("likeness", "leak")}
            text = (
                f"{score} {statistics.mean(some):+.3f} ± {statistics.stdev(some) / math.sqrt(len(some)):.3f}"
                for score, some in ahead.items()
            )
            print("    ahead by:", *text)


if __name__ == "__main__":
    app()
