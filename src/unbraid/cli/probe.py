"""`unbraid probe-blocks`: parse, call, print."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from unbraid.cli.options import Device, Parts, Quiet, Vram
from unbraid.cli.progress import console, progress_bar
from unbraid.common.errors import UsageError

app = typer.Typer()


@app.command(name="probe-blocks")
def probe_blocks(
    base: Annotated[str, typer.Argument(metavar="BASE", help="icons, a folder, a hub id or a checkpoint.")] = "icons",
    out: Annotated[Path, typer.Option(help="Folder for the table, the picture and roles.toml.")] = Path("blocks"),
    subject: Annotated[list[str] | None, typer.Option(help="A subject that the base draws well; repeatable.")] = None,
    style: Annotated[list[str] | None, typer.Option(help="A style that it draws well; repeatable.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Two LoRAs to swap in place of words; give it twice.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What is drawn with the LoRAs; repeatable. Without, their own prompts.")
    ] = None,
    pairs: Annotated[
        int, typer.Option(help="How many subjects and styles, or LoRAs, are swapped; fewer than 4 give no roles.")
    ] = 8,
    seeds: Annotated[int, typer.Option(help="Pictures of each.")] = 2,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    size: Annotated[int, typer.Option(help="Neighbouring blocks that are swapped together.")] = 1,
    clip: Annotated[str, typer.Option(help="CLIP, a folder or hub id: for what --dino and --csd do not see.")] = "",
    dino: Annotated[str, typer.Option(help="DINO or DINOv2, for content.")] = "",
    csd: Annotated[str, typer.Option(help="CSD, for style.")] = "",
    parts: Parts = "",
    vram: Vram = "max",
    device: Device = "",
    quiet: Quiet = False,
) -> None:
    """Measure which blocks of a base serve content and which style.

    One group of blocks at a time reads another prompt, or has another LoRA. Writes roles.toml for --blocks."""
    _check(lora, prompt, [*(subject or ()), *(style or ())], min(pairs, seeds, steps, size))
    with console.status("loading"):
        from unbraid.bases.base import load
        from unbraid.bases.loadable import check_loading
        from unbraid.bases.presets import Loading
        from unbraid.bench.field.models import load_models
        from unbraid.bench.probe import report
        from unbraid.bench.probe.loras import LoraPlan, probe_loras
        from unbraid.bench.probe.measure import Plan, eyes, probe
        from unbraid.bench.probe.words import words

        amount = {"pairs": pairs, "seeds": seeds, "steps": steps, "size": size}
        plan: Any = LoraPlan(lora, prompt or (), **amount) if lora else None
        if plan:
            plan.check()  # before a base is loaded
        loading = Loading(parts=parts, vram=vram, graphs=False)
        check_loading(base, loading)
        opened = load(base, device or None, loading)
        looking = eyes(opened, load_models(clip or None, dino or None, csd or None, device=device or None))
    if plan:
        events = probe_loras(opened, looking, plan)
    else:
        plan = Plan(*words(opened.name, subject or (), style or ()), **amount)
        events = probe(opened, looking, plan)
    rows = _drawn(events, quiet)
    files = report.write(rows, base, looking.names, plan, out)
    if not quiet:
        names = ["all groups", *map(report.label, rows[1:])]
        _print(names, rows)
    for file in files:
        print(file)


def _drawn(events: Iterable[Any], quiet: bool) -> list[Any]:
    """Draw, and show the progress. Returns the rows."""
    rows: list[Any] = []
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("drawing", total=None)
        for event in events:
            if isinstance(event, list):
                rows = event
            else:
                bar.update(task, completed=event[0], total=event[1])
    return rows


def _print(names: list[str], rows: list[Any]) -> None:
    """Print the effects of the groups. The first row is that of all groups together, and has no role."""
    table = Table("group", "content", "style", "role")
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        table.add_row(name, f"{row.content.mean:.2f}", f"{row.style.mean:.2f}", row.role if i else "")
    Console(stderr=True).print(table)


def _check(loras: list[str] | None, prompts: list[str] | None, words: list[str], least: int) -> None:
    """Raise UsageError for options that do not go together, and numbers below 1. `words`: subjects and styles."""
    if least < 1:
        raise UsageError("a number below 1", "probe-blocks", "Give 1 or more for pairs, seeds, steps and size.")
    if loras and len(loras) != 2:
        raise UsageError(f"{len(loras)} LoRAs", "--lora", "Give two, or none to swap prompts.")
    if loras and words:
        raise UsageError("words are not swapped if LoRAs are", "--subject, --style", "Leave them out, or the LoRAs.")
    if prompts and not loras:
        raise UsageError("goes with two LoRAs", "--prompt", "Give --subject and --style, or --lora twice.")
