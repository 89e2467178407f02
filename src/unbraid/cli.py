"""The command line: parse, call, print."""

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unbraid.cli_files import app as file_commands
from unbraid.errors import UsageError
from unbraid.settings import parse_set

app = typer.Typer(
    help="Take an image apart into a content LoRA and a style LoRA, and put LoRAs together again.",
    epilog="Try: unbraid demo. Then: unbraid split my.png --subject dog --style watercolour",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.registered_commands += file_commands.registered_commands
console = Console(stderr=True)

Out = Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME-METHOD.")]
BaseName = Annotated[str, typer.Option("--base", help="icons (embedded), a diffusers folder, or a hub id.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Config = Annotated[Path | None, typer.Option(help="TOML file with a table per method; a run.toml will do.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting of the method; repeatable.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors and the files made.")]
Previews = Annotated[int, typer.Option(help="How many preview sheets during training.")]


@app.command()
def split(
    image: Annotated[Path, typer.Argument(help="One picture.")],
    subject: Annotated[str, typer.Option(help="What is drawn, in a word or two: octopus.")],
    style: Annotated[str, typer.Option(help="How it is drawn: line art.")],
    out: Out = None,
    method: str = "unziplora",
    base: BaseName = "icons",
    seed: Seed = 0,
    previews: Previews = 3,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """One image → content.safetensors and style.safetensors."""
    from unbraid.api import split_job

    options = _options(set_, out=out, base=base, seed=seed, previews=previews, config=config)
    job = split_job(image, subject=subject, style=style, method=method, **options)
    _run(job, resume, quiet)


@app.command()
def learn(
    images: Annotated[list[Path], typer.Argument(help="Pictures of one thing, or folders of them.")],
    prompt: Annotated[str, typer.Option(help="What to call it: a sks dog.")],
    out: Out = None,
    method: str = "dreambooth",
    base: BaseName = "icons",
    seed: Seed = 0,
    previews: Previews = 3,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Images of one thing → lora.safetensors."""
    from unbraid.api import learn_job

    options = _options(set_, out=out, base=base, seed=seed, previews=previews, config=config)
    _run(learn_job(list(images), prompt=prompt, method=method, **options), resume, quiet)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="A .png for one picture, else a folder.")],
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="A LoRA at a strength; repeatable.")
    ] = None,
    lora_prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What the LoRA of the same position reads in cross-attention; `own` is what it was trained with."
        ),
    ] = None,
    negative: str = "",
    n: Annotated[int, typer.Option("--n", help="How many pictures, at seeds SEED, SEED+1, …")] = 1,
    seed: Seed = 0,
    steps: int = 25,
    guidance: float = 4.0,
    height: int | None = None,
    width: int | None = None,
    base: BaseName = "icons",
) -> None:
    """Prompts and LoRAs → pictures. Strengths may be negative."""
    from unbraid.base import load
    from unbraid.pictures import save_image
    from unbraid.render import render

    uses = _uses(lora or [], lora_prompt or [])
    if n > 1 and out.suffix:
        raise UsageError(f"{n} pictures do not fit into one file", out, "Give a folder.")
    options: dict[str, Any] = {
        "negative": negative,
        "guidance": guidance,
        "steps": steps,
        "height": height,
        "width": width,
    }
    with console.status("drawing"):
        images = render(load(base), prompt, uses, seeds=range(seed, seed + n), **options)
    for i, image in enumerate(images):
        print(save_image(image, out if out.suffix else out / f"{seed + i:04d}.png"))


@app.command()
def explain(method: Annotated[str, typer.Argument(help="For example unziplora.")]) -> None:
    """Print what a method does at every kind of step, its prompts, its outputs and its settings."""
    from unbraid.explain import explain as text

    print(text(method))


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for the run and the contact sheet.")] = Path("demo")) -> None:
    """Split a bundled picture on the embedded base, and draw a contact sheet with the two LoRAs."""
    from unbraid import demo as show

    if not (out / "content.safetensors").exists():
        _run(show.job(out), resume=(out / "run.toml").exists(), quiet=False)
    with console.status("drawing the contact sheet"):
        sheet = show.sheet(out)
    print(
        f"\nThe contact sheet: {sheet}\nThe LoRAs:         {out / 'content.safetensors'}, {out / 'style.safetensors'}"
    )
    print(f"Next:              {show.NEXT.format(out=out)}")


def _uses(loras: list[str], prompts: list[str]) -> list[Any]:
    from unbraid.render import Use

    if prompts and len(prompts) != len(loras):
        raise UsageError(
            f"{len(prompts)} prompts for {len(loras)} LoRAs", "--lora-prompt", "Give one per --lora, or none."
        )
    uses = []
    for i, text in enumerate(loras):
        name, colon, scale = text.rpartition(":")
        try:
            use = (Path(name), float(scale)) if colon else (Path(text), 1.0)
        except ValueError:
            use = (Path(text), 1.0)
        uses.append(Use(*use, prompt=prompts[i] if prompts else None))
    return uses


def _options(pairs: list[str] | None, **options: Any) -> dict[str, Any]:
    """What the training verbs have in common, with the settings of the method."""
    settings = parse_set(pairs or [])
    for key in settings:
        if key in (*options, "method", "image", "images", "words", "subject", "style", "prompt"):
            raise UsageError(
                f"{key!r} is not a setting of the method", "--set", "It has an option of its own: see --help."
            )
    return {**options, **settings}


def _run(job: Any, resume: bool, quiet: bool) -> None:
    from unbraid.run import run

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    events, made = run(job, resume=resume), []
    with console.status("loading", spinner="line") if not quiet else nullcontext():
        first = next(events)
    if not quiet:
        console.print(f"{job.method} on {job.base} → {job.out}", markup=False, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task("training", total=first.total, loss="")
        for event in chain((first,), events):
            if event.step:
                bar.update(task, completed=event.done, loss=f"loss {event.step.loss:.4f}")
            if event.file:
                made.append(event.file)
                bar.console.print(f"  wrote {event.file}", markup=False, highlight=False, soft_wrap=True)
    for file in _results(made):
        print(file)


def _results(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if file.suffix == ".safetensors"]


def main() -> None:
    """Entry point. 0 done, 1 UsageError, 2 wrong command line, 130 interrupted (resumable)."""
    try:
        code = app(standalone_mode=False) or 0
    except UsageError as error:
        print(f"unbraid: {error}", file=sys.stderr)
        code = 1
    except (typer.Abort, KeyboardInterrupt):
        print("unbraid: interrupted; the same command with --resume goes on", file=sys.stderr)
        code = 130
    except Exception as error:
        if not hasattr(error, "exit_code"):  # click's own errors know how to show themselves
            raise
        error.show()  # type: ignore[attr-defined]
        code = error.exit_code  # type: ignore[attr-defined]
    sys.exit(code)
