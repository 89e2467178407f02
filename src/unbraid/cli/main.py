"""The command line: parse, call, print."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unbraid.cli.batch import app as batch_commands
from unbraid.cli.bench import app as bench_commands
from unbraid.cli.checkpoints import app as checkpoint_commands
from unbraid.cli.files import app as file_commands
from unbraid.cli.run import BaseName, Device, Graphs, Prediction, Seed, Todo, Vae, console, run_job
from unbraid.cli.selftest import app as selftest_commands
from unbraid.cli.train import app as training_commands
from unbraid.common.errors import UsageError

app = typer.Typer(
    epilog="Try: unbraid demo. Then: unbraid split my.png --subject dog --style watercolour\n\nExit status: 0 done; 1 something to mend, said in one line; 2 wrong command line; 3 the LoRAs are done, a sheet or preview is not; 130 interrupted, --resume goes on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    training_commands,
    batch_commands,
    file_commands,
    checkpoint_commands,
    bench_commands,
    selftest_commands,
)
for commands in COMMANDS:
    app.registered_commands += commands.registered_commands


def _version(wanted: bool) -> bool:
    if wanted:
        print(version("unbraid"))
        raise typer.Exit
    return wanted


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Take an image apart into a content LoRA and a style LoRA, and put LoRAs together again."""


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
    style_guidance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]",
            help="A style LoRA that guides, and leaves the composition to the base; 1 is as trained. Repeatable.",
        ),
    ] = None,
    style_prompt: Annotated[
        list[str] | None,
        typer.Option(help="The style's words, if its file does not say: `ink` adds `in ink style` to the prompt."),
    ] = None,
    style_from: Annotated[
        float, typer.Option(help="Styles guide once this much noise is left: 1 always, 0.8 keeps more of the layout.")
    ] = 1.0,
    edit: Annotated[
        Path | None,
        typer.Option(help="A picture that the prompt describes: styles are applied to it. Take 50 steps or more."),
    ] = None,
    from_: Annotated[Path | None, typer.Option("--from", help="A picture to begin with, in place of noise.")] = None,
    strength: Annotated[float, typer.Option(help="How much noise to put on it: 1 leaves nothing of it.")] = 0.6,
    mask: Annotated[Path | None, typer.Option(help="What of it is drawn anew: white. The rest is kept.")] = None,
    controlnet: Annotated[
        str, typer.Option(metavar="NAME[:SCALE]", help="A ControlNet: a diffusers folder, or a hub id.")
    ] = "",
    control_image: Annotated[
        Path | None, typer.Option(help="The map that it reads, ready-made: edges, depth, a pose.")
    ] = None,
    combine: Annotated[
        Literal["sum", "switch", "composite", "k-lora"],
        typer.Option(help="Several LoRAs: all at once; in turn; each guides, averaged; layer by layer, content first."),
    ] = "sum",
    sweep: Annotated[
        str, typer.Option(metavar="WHAT=FROM:TO:N", help="One sheet over strengths: style=0:1.5:7, lora=…, guidance=…")
    ] = "",
    negative: str = "",
    n: Annotated[int, typer.Option("--n", min=1, help="How many pictures, at seeds SEED, SEED+1, …")] = 1,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 25,
    sampler: Annotated[str, typer.Option(help="ddim, euler, euler-a, dpm++ or unipc; without, the base's own.")] = "",
    guidance: float = 4.0,
    height: int | None = None,
    width: int | None = None,
    base: BaseName = "icons",
    vae: Vae = "",
    prediction: Prediction = "",
    graphs: Graphs = True,
    device: Device = "",
) -> None:
    """Prompts and LoRAs → pictures. Strengths may be negative."""
    from unbraid.bases.presets import Loading
    from unbraid.images.sheets import save_image
    from unbraid.sampling.render import render
    from unbraid.sampling.sweep import parse_sweep, sweep_sheet

    uses = _uses(lora or [], lora_prompt or [])
    styles = _uses(style_guidance or [], style_prompt or [], "--style-guidance")
    given: dict[str, Any] = {
        "style_from": style_from,
        "edit": edit,
        "start": _start(from_, strength, mask),
        "control": _control(controlnet, control_image),
        "combine": combine,
        "negative": negative,
        "guidance": guidance,
        "steps": steps,
        "sampler": sampler,
        "height": height,
        "width": width,
    }
    seeds, loading = range(seed, seed + n), Loading(vae, prediction, graphs=graphs, device=device)
    if sweep:
        over, file = parse_sweep(sweep), out if out.suffix else out / "sweep.png"
        with console.status("drawing"):
            print(
                save_image(
                    sweep_sheet(_opened(base, loading, prompt, negative), prompt, over, uses, styles, seeds, **given),
                    file,
                )
            )
        return
    if n > 1 and out.suffix:
        raise UsageError(f"{n} pictures do not fit into one file", out, "Give a folder.")
    with console.status("drawing"):
        images = render(_opened(base, loading, prompt, negative), prompt, uses, styles=styles, seeds=seeds, **given)
    for i, image in enumerate(images):
        print(save_image(image, out if out.suffix else out / f"{seed + i:04d}.png"))


@app.command()
def explain(method: Annotated[str, typer.Argument(help="For example unziplora.")], base: BaseName = "icons") -> None:
    """Print what a method does at every kind of step, its prompts, its outputs and its settings."""
    from unbraid.runs.explain import explain as text

    print(text(method, base))


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for the run and the contact sheet.")] = Path("demo")) -> None:
    """Split a bundled picture on the embedded base, and draw a contact sheet with the two LoRAs."""
    from unbraid.runs import demo as show

    if not (out / "content.safetensors").exists():
        run_job(show.job(out), resume=(out / "run.toml").exists(), quiet=False)
    with console.status("drawing the contact sheet"):
        sheet = show.sheet(out)
    print(
        f"\nThe contact sheet: {sheet}\nThe LoRAs:         {out / 'content.safetensors'}, {out / 'style.safetensors'}"
    )
    print(f"Next:              {show.NEXT.format(out=out)}")


def _opened(name: str, loading: Any, *prompts: str) -> Any:
    """Load the base, and print a note if a prompt is long, about how it is encoded."""
    from unbraid.bases.base import load
    from unbraid.bases.families.long_prompts import remarks

    base = load(name, loading=loading)
    for told in remarks(base.pipe, prompts):
        console.print(f"  {told}", markup=False, highlight=False, soft_wrap=True)
    return base


def _start(image: Path | None, strength: float, mask: Path | None) -> Any:
    from unbraid.sampling.canvas import Start

    if mask and not image:
        raise UsageError("a mask of nothing", mask, "Give the picture: --from IMAGE.")
    return Start(image, strength, mask) if image else None


def _control(model: str, image: Path | None) -> Any:
    from unbraid.sampling.canvas import Control

    if bool(model) != bool(image):
        fix = "Give both --controlnet NAME and --control-image IMAGE."
        raise UsageError("a ControlNet and its map go together", model or image or "", fix)
    name, scale = _scaled(model)
    return Control(name, image, scale) if image else None


def _uses(loras: list[str], prompts: list[str], option: str = "--lora") -> list[Any]:
    from unbraid.sampling.render import Use

    if prompts and len(prompts) != len(loras):
        fix = f"Give one per {option}, or none."
        raise UsageError(f"{len(prompts)} prompts for {len(loras)} LoRAs", option, fix)
    uses = []
    for i, text in enumerate(loras):
        name, scale = _scaled(text)
        uses.append(Use(Path(name), scale, prompt=prompts[i] if prompts else None))
    return uses


def _scaled(text: str) -> tuple[str, float]:
    """Parse NAME or NAME:SCALE. The name may contain colons."""
    name, colon, scale = text.rpartition(":")
    try:
        return (name, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def main() -> None:
    """Entry point. Exit status: 0 done, 1 UsageError, 2 wrong command line, 3 done except for a picture, 130
    interrupted (can be resumed)."""
    try:
        done = app(standalone_mode=False)
        if isinstance(done, Todo):
            done = run_job(done.job, done.resume, done.quiet)
        code = done if isinstance(done, int) else 0
    except UsageError as error:
        print(f"unbraid: {error}", file=sys.stderr)
        code = 1
    except (typer.Abort, KeyboardInterrupt):
        print("unbraid: interrupted; the same command with --resume goes on", file=sys.stderr)
        code = 130
    except Exception as error:
        if not hasattr(error, "exit_code"):  # click's own errors have `exit_code` and `show`
            raise
        error.show()  # type: ignore[attr-defined]
        code = error.exit_code  # type: ignore[attr-defined]
    sys.exit(code)
