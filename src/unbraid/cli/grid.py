"""`unbraid grid`: many runs as job folders, and their report."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TextColumn
from typer.core import TyperCommand

from unbraid.cli import grid_file
from unbraid.cli.options import Cpus, Device, Gpus, Quiet, Ray, Retries, Shard, check_ray
from unbraid.cli.progress import progress_bar
from unbraid.cli.run import UNDONE, interruptible, loading
from unbraid.common.errors import UsageError

app = typer.Typer()


class Grid(TyperCommand):
    """The command, with an example in its help."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("FILE, for example"):
            for line in grid_file.EXAMPLE.splitlines():
                formatter.write(f"  {line}\n")


@app.command(cls=Grid)
def grid(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|FOLDER|report",
            help="TOML, see below; a folder of job folders, or one of these; or the word `report`.",
        ),
    ],
    folder: Annotated[Path | None, typer.Argument(help="The folder of a grid, after `report`.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the job folders; default `out` in FILE, else grids/FILE.")
    ] = None,
    shard: Shard = "",
    ray: Ray = "",
    gpus: Gpus = None,
    cpus: Cpus = 1,
    retries: Retries = 3,
    at_once: Annotated[int, typer.Option(help="Runs in one forward pass; not bit for bit as alone.")] = 1,
    device: Device = "",
    by: Annotated[str, typer.Option(help="With report: the figure that the best have most of; -NAME: least.")] = "",
    judge: Annotated[bool, typer.Option("--judge", help="With report: score drawings by the judge, on icons.")] = False,
    clip: Annotated[str, typer.Option(help="With report: score them by CLIP, a folder or hub id.")] = "",
    dino: Annotated[str, typer.Option(help="The same by DINO or DINOv2.")] = "",
    csd: Annotated[str, typer.Option(help="The same by CSD.")] = "",
    quiet: Quiet = False,
) -> int:
    """Pictures × methods × settings × seeds, a folder for each run.

    The same command goes on after an interruption, and may be given on several machines that share the folder.
    `unbraid grid report FOLDER` makes a table, sheets and curves."""
    if str(file) == "report":
        return _report(folder, out, by, {"clip": clip, "dino": dino, "csd": csd}, judge, quiet)
    if by or judge or clip or dino or csd:
        fix = "Train first, then `unbraid grid report FOLDER`."
        raise UsageError("these options go with `report`", "--by, --judge, --clip, --dino, --csd", fix)
    check_ray(ray, gpus)
    if folder:
        raise UsageError("there are two arguments", folder, "Give FILE or FOLDER alone, or `report FOLDER`.")
    with loading("torch and diffusers", quiet):
        from unbraid.runs.cluster import Cluster
    folders = _found(file, shard) if file.is_dir() else _written(file, out, shard)
    with interruptible():
        failed, undone = _watch(folders, at_once, device, Cluster(ray, gpus, cpus, retries) if ray else None, quiet)
    where = folders[0].parent if folders else file
    if failed:
        raise UsageError(f"{failed} of {len(folders)} runs failed", where, "The same command tries them again.")
    print(where)
    return UNDONE if undone else 0


def _found(where: Path, shard: str) -> list[Path]:
    """The job folders of this share of a folder of them. A job folder stands for itself."""
    from unbraid.runs.folder import is_job
    from unbraid.runs.grid_worker import share
    from unbraid.runs.job_folder import folders

    i, n = share(shard)
    return ([where] if is_job(where) else folders(where))[i::n]


def _written(file: Path, out: Path | None, shard: str) -> list[Path]:
    """The job folders of this share of the grid. Those that are missing are made, when all of them are known to be right."""
    from unbraid.runs.checks import check_all
    from unbraid.runs.folder import is_job
    from unbraid.runs.grid_worker import share
    from unbraid.runs.job_folder import write_job

    own, runs = grid_file.read(file)
    i, n = share(shard)
    where, mine = out or own, runs[i::n]
    jobs = [grid_file.job(run, where, file) for run in mine if not is_job(where / run.name)]
    check_all(jobs)
    for job in jobs:
        write_job(job)
    return [where / run.name for run in mine]


def _watch(folders: list[Path], at_once: int, device: str, ray: Any, quiet: bool) -> tuple[int, bool]:
    """Train, and show the progress. Returns the number of failed runs, and whether some picture could not be made."""
    from unbraid.runs.grid import run

    ended, failed, undone = set[Path](), 0, False
    with progress_bar(TextColumn("{task.fields[now]}"), quiet=quiet) as bar:
        whole = bar.add_task("runs", total=len(folders), now="")
        for event in run(folders, at_once, device or None, ray):
            step = event.progress
            if event.held:
                bar.update(whole, now=f"waiting for {event.folder.name}, which another worker has")
            elif event.error:
                failed += 1
                bar.console.print(f"unbraid: {event.error}", markup=False, highlight=False, soft_wrap=True)
            elif step:
                undone |= step.undone
                if step.warning:
                    text = f"  {event.folder.name}: {step.warning}"
                    bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
                bar.update(whole, now=f"{event.folder.name}: step {step.done} of {step.total}")
            if event.done or event.error:
                ended.add(event.folder)
                bar.update(whole, completed=len(ended))
    return failed, undone


def _report(folder: Path | None, out: Path | None, by: str, models: dict[str, str], judge: bool, quiet: bool) -> int:
    if folder is None:
        raise UsageError("whose report?", "grid report", "Give the folder of the grid.")
    if judge or any(models.values()):
        _score(folder, models, judge, quiet)
    with loading("the runs", quiet):
        from unbraid.runs.grid_report import report

        made = report(folder, out or folder, by)
    for line in made:
        print(line)
    return 0


def _score(folder: Path, models: dict[str, str], judge: bool, quiet: bool) -> None:
    """Draw with the LoRAs of the finished runs that have no such scores yet, and score the drawings."""
    from unbraid.bench.field.grid_scores import score_runs
    from unbraid.bench.field.models import load_models
    from unbraid.runs.job_folder import folders, is_done

    todo = [one for one in folders(folder) if is_done(one)]
    loaded = load_models(**{name: model or None for name, model in models.items()})
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("scores", total=len(todo))
        for _ in score_runs(todo, loaded, judge):
            bar.update(task, advance=1)
