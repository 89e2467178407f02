"""`unbraid probe-blocks`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from unbraid.cli.options import Device, Quiet, Vram
from unbraid.cli.progress import console, progress_bar
from unbraid.common.errors import UsageError

app = typer.Typer()


@app.command(name="probe-blocks")
def probe_blocks(
    base: Annotated[str, typer.Argument(metavar="BASE", help="icons, a folder, a hub id or a checkpoint.")] = "icons",
    out: Annotated[Path, typer.Option(help="Folder for the table, the picture and roles.toml.")] = Path("blocks"),
    subject: Annotated[list[str] | None, typer.Option(help="A subject that the base draws well; repeatable.")] = None,
    style: Annotated[list[str] | None, typer.Option(help="A style that it draws well; repeatable.")] = None,
    pairs: Annotated[
        int, typer.Option(help="How many subjects and styles are swapped; fewer than 4 give no roles.")
    ] = 8,
    seeds: Annotated[int, typer.Option(help="Pictures of each.")] = 2,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    size: Annotated[int, typer.Option(help="Neighbouring blocks that are swapped together.")] = 1,
    clip: Annotated[str, typer.Option(help="CLIP, a folder or hub id: for what --dino and --csd do not see.")] = "",
    dino: Annotated[str, typer.Option(help="DINO or DINOv2, for content.")] = "",
    csd: Annotated[str, typer.Option(help="CSD, for style.")] = "",
    vram: Vram = "max",
    device: Device = "",
    quiet: Quiet = False,
) -> None:
    """Measure which blocks of a base serve content and which style.

    One group of blocks at a time reads another prompt. Writes roles.toml for --blocks."""
    if min(pairs, seeds, steps, size) < 1:
        raise UsageError("a number below 1", "probe-blocks", "Give 1 or more for pairs, seeds, steps and size.")
    with console.status("loading"):
        from unbraid.bases.base import load
        from unbraid.bases.presets import Loading
        from unbraid.bench.field.models import load_models
        from unbraid.bench.probe import report
        from unbraid.bench.probe.measure import Plan, eyes, probe
        from unbraid.bench.probe.words import words

        opened = load(base, device or None, Loading(vram=vram, graphs=False))
        looking = eyes(opened, load_models(clip or None, dino or None, csd or None, device=device or None))
    plan = Plan(*words(opened.name, subject or (), style or ()), pairs, seeds, steps, size=size)
    rows = []
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("drawing", total=None)
        for event in probe(opened, looking, plan):
            if isinstance(event, list):
                rows = event
            else:
                bar.update(task, completed=event[0], total=event[1])
    files = report.write(rows, base, looking.names, plan, out)
    if not quiet:
        table = Table("group", "content", "style", "role")
        for i, row in enumerate(rows):
            name = "all groups" if i == 0 else report.label(row)
            table.add_row(name, f"{row.content.mean:.2f}", f"{row.style.mean:.2f}", row.role if i else "")
        Console(stderr=True).print(table)
    for file in files:
        print(file)
