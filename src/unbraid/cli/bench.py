"""`unbraid bench`: parse, call, print."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TextColumn, TimeElapsedColumn

from unbraid.cli.options import BaseName, Cpus, Gpus, Parts, Quiet, Ray, Retries, Shard, check_ray
from unbraid.cli.progress import console, progress_bar
from unbraid.cli.run import interruptible
from unbraid.common.errors import UsageError

app = typer.Typer()
Images = Annotated[
    Path | None,
    typer.Option(help="Your own pictures (docs/field-metrics.md), scored by the models below, not by true answers."),
]
Known = Annotated[
    Path | None,
    typer.Option("--results", help="A results.jsonl: units in it are done, if base, versions and settings are these."),
]
Medium = Annotated[bool, typer.Option("--medium", help="Eight subjects of --full (about two hours).")]
Full = Annotated[
    bool,
    typer.Option("--full/--quick", help="32 subjects, each in one of four styles (hours), or one of each (minutes)."),
]

Tasks = Annotated[
    list[str] | None, typer.Option(help="separate, combine, transfer or recombine; repeatable. Default: all.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="A row by its name; repeatable. `list` prints the names; `all`: ablations too. Default: all but ablations."
    ),
]
Over = Annotated[
    list[str] | None,
    typer.Option(metavar="ROW", help="Also write leads.md: each row of the report against this one; repeatable."),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(
        min=0, max=2**31 - 1, help="Of training and drawing; repeatable: everything once per seed. Default: 0."
    ),
]
Clip = Annotated[
    str, typer.Option(help="CLIP, a folder or hub id: CLIP-I and CLIP-T. For --images, like the next three.")
]


@app.command()
def bench(
    full: Full = False,
    medium: Medium = False,
    work: Annotated[Path, typer.Option(help="Folder for everything; the same folder again resumes.")] = Path("bench"),
    task: Tasks = None,
    only: Only = None,
    seed: Seeds = None,
    processes: Annotated[int, typer.Option(help="How many at once; 0: one per core, or one on an accelerator.")] = 0,
    known: Known = None,
    report: Annotated[bool, typer.Option("--report", help="Only report what is there.")] = False,
    over: Over = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report; default WORK/report.")] = None,
    images: Images = None,
    protocol: Annotated[str, typer.Option(help="Whose prompts, for --images: plain or contexts.")] = "plain",
    clip: Clip = "",
    dino: Annotated[str, typer.Option(help="DINO or DINOv2.")] = "",
    csd: Annotated[str, typer.Option(help="CSD, or a CLIP tower for style.")] = "",
    lpips: Annotated[str, typer.Option(help="Folder with LPIPS's weights.")] = "",
    base: BaseName = "icons",
    parts: Parts = "",
    shard: Shard = "",
    ray: Ray = "",
    gpus: Gpus = None,
    cpus: Cpus = 1,
    retries: Retries = 3,
    quiet: Quiet = False,
) -> None:
    """Compare all methods on tasks with right answers.

    Writes a table, a page and pictures that show which one works."""
    from unbraid.bases.loadable import check_loading
    from unbraid.bases.presets import Loading
    from unbraid.bench import grid, results
    from unbraid.bench.registry import chosen, named
    from unbraid.bench.truth.tasks import FULL, MEDIUM, QUICK
    from unbraid.runs.cluster import Cluster
    from unbraid.runs.grid_worker import share

    models = {"clip": clip, "dino": dino, "csd": csd, "lpips": lpips}
    _check(task or (), models, images, shared_out=bool(shard or ray), both=full and medium, over=bool(over))
    check_ray(ray, gpus)
    if only == ["list"]:
        _list(task or ())
        return
    check_loading(base, Loading(parts=parts))
    seeds = tuple(dict.fromkeys(seed or (0,)))
    if images:
        selection = (task or (), only or (), seeds)
        _field(work, out or work / "report", (base, parts), images, protocol, models, selection)
        return
    scale = replace(FULL if full else MEDIUM if medium else QUICK, seeds=seeds)
    rows = chosen(task or (), only or ())
    others = [named(one, rows, "--over") for one in over or ()]
    todos = grid.plan(work, scale, rows, base, parts)
    given, (i, n) = results.read(known) if known else [], share(shard)
    cluster = Cluster(ray, gpus, cpus, retries) if ray else None
    mine = [] if report else todos[i::n]
    made, failed = _run(len(mine), grid.run(mine, _processes(processes), given, cluster), quiet)
    _report(todos, [*given, *made], work, out or work / "report", others)
    _tell(failed, len(mine), work)


def _check(
    tasks: Sequence[str], models: dict[str, str], images: Path | None, *, shared_out: bool, both: bool, over: bool
) -> None:
    """Raise UsageError for a task that there is not, and for options that do not go together. `both`: whether both sizes are given; `over`:
    whether a row to compare with is."""
    from unbraid.bench.truth.tasks import TASKS

    for name in tasks:
        if name not in TASKS:
            raise UsageError(f"there is no task {name!r}", "--task", f"There are: {', '.join(TASKS)}.")
    if images and shared_out:
        raise UsageError("your own pictures are not shared out", "--shard, --ray", "Leave them out.")
    if images and over:
        raise UsageError("your own pictures have no true answers to compare by", "--over", "Leave it out.")
    if not images and any(models.values()):
        raise UsageError("nothing to measure", "--clip and the like", "They score your own pictures: --images DIR.")
    if both:
        raise UsageError("there is one size", "--full --medium", "Give one of them.")


def _list(tasks: Sequence[str]) -> None:
    """Print the names of all rows, of these tasks if any are given."""
    from unbraid.bench.registry import all_rows

    for name in dict.fromkeys(row.name for row in all_rows() if not tasks or row.task in tasks):
        print(name)


def _field(
    work: Path,
    out: Path,
    base: tuple[str, str],
    images: Path,
    name: str,
    models: dict[str, str],
    selection: tuple[Any, ...],
) -> None:
    """Run the same rows on a user's own pictures, scored by the usual metrics (docs/field-metrics.md). `base`: its name, and `--parts`."""
    from unbraid.bench.field.models import load_models
    from unbraid.bench.field.protocol import PROTOCOLS, Selection, protocol
    from unbraid.bench.field.report import write

    if not any(models.values()):
        fix = "Give one or more of --clip, --dino, --csd, --lpips."
        raise UsageError("there is no model to score the pictures with", "--images", fix)
    units, failed = [], []
    loaded = load_models(**{key: model or None for key, model in models.items()})
    with console.status("training and drawing") as status:
        events = protocol(work, base[0], images, loaded, name=name, selection=Selection(*selection), parts=base[1])
        for done in events:
            status.update(f"{len(units)} done: {done.todo.row}, {done.todo.cell}")
            if done.unit:
                units.append(done.unit)
            else:
                failed.append(f"{done.todo.row}: {done.todo.cell} ({done.error})")
                console.print(f"  failed: {failed[-1]}", markup=False, highlight=False, soft_wrap=True)
    for file in write(units, PROTOCOLS[name], work, out) if units else ():
        print(file)
    _tell(failed, len(failed) + len(units), work)


def _tell(failed: Sequence[str], count: int, work: Path) -> None:
    if failed:
        what = f"{len(failed)} of {count} units failed, such as {failed[0]}"
        raise UsageError(what, work, "The rest is in the report; the same command tries them again.")


def _run(count: int, events: Iterable[Any], quiet: bool) -> tuple[list[Any], list[str]]:
    """Show the progress. Returns the units, and what to say of those that failed."""
    made, failed = [], []
    columns = TextColumn("{task.fields[now]}"), TimeElapsedColumn()
    with interruptible(), progress_bar(*columns, quiet=quiet or not count) as bar:
        progress = bar.add_task("benchmark", total=count, now="")
        for done in events:
            name = f"{done.todo.row}: {done.todo.cell}"
            if done.held:
                bar.update(progress, now=f"{name} is another worker's")
                continue
            bar.update(progress, advance=1, now=name)
            if done.unit is None:
                failed.append(f"{name} ({done.error})")
                bar.console.print(f"  failed: {failed[-1]}", markup=False, highlight=False, soft_wrap=True)
            else:
                made.append(done.unit)
    return made, failed


def _processes(given: int) -> int:
    from unbraid.bases.devices import pick_device

    if given < 0:
        raise UsageError(f"{given} processes", "--processes", "Give 1 or more, or 0 for one per core.")
    return given or (1 if pick_device() != "cpu" else os.cpu_count() or 1)


def _report(todos: list[Any], given: list[Any], work: Path, out: Path, over: Sequence[str]) -> None:
    from unbraid.bench import grid, results
    from unbraid.bench.reports import report

    planned = {grid.key(todo): (todo.cell.task, todo.row, str(todo.cell)) for todo in todos}
    units = results.wanted([*given, *results.collect(work)], planned)
    if not units:
        fix = "Give the --task, --only and --seed that were run, or run it without --report first."
        raise UsageError("there is nothing to report", work, fix)
    for file in report.write(units, len(todos), work, out, over):
        print(file)
    if missing := set(over) - {unit.row for unit in units}:
        raise UsageError("no unit of this row is there", f"--over {min(missing)}", "Run it first, without --report.")
