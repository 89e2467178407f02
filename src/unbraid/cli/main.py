"""The command line: parse, call, print."""

import gc
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from unbraid.cli.batch import app as batch_commands
from unbraid.cli.bench import app as bench_commands
from unbraid.cli.checkpoints import app as checkpoint_commands
from unbraid.cli.files import app as file_commands
from unbraid.cli.generate import app as drawing_commands
from unbraid.cli.grid import app as grid_commands
from unbraid.cli.options import BaseName
from unbraid.cli.probe import app as probe_commands
from unbraid.cli.push import app as publishing_commands
from unbraid.cli.run import Todo, console, loading, run_job
from unbraid.cli.selftest import app as selftest_commands
from unbraid.cli.studio import app as studio_commands
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
    grid_commands,
    file_commands,
    checkpoint_commands,
    bench_commands,
    probe_commands,
    selftest_commands,
    drawing_commands,
    studio_commands,
    publishing_commands,
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
def explain(method: Annotated[str, typer.Argument(help="For example unziplora.")], base: BaseName = "") -> None:
    """Print what a method does, and its settings.

    Its steps, its prompts, the files that it makes, and the defaults of its settings on a base."""
    with loading("the methods"):
        from unbraid.runs.explain import explain as text
        from unbraid.runs.preferences import default_base
    print(text(method, base or default_base()))


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for the run and the contact sheet.")] = Path("demo")) -> None:
    """Split a bundled picture, and draw a contact sheet.

    On the embedded base, with both LoRAs, each alone and together."""
    from unbraid.runs import demo as show

    if not (out / "content.safetensors").exists():
        run_job(show.job(out), resume=(out / "run.toml").exists(), quiet=False)
    with console.status("drawing the contact sheet"):
        sheet = show.sheet(out)
    print(
        f"\nThe contact sheet: {sheet}\nThe LoRAs:         {out / 'content.safetensors'}, {out / 'style.safetensors'}"
    )
    print(f"Next:              {program()} {show.NEXT.format(out=out)}")


def program() -> str:
    """How this program is called from here: its name if that is on the PATH, else its file."""
    return "unbraid" if shutil.which("unbraid") else shlex.quote(sys.argv[0])


def main() -> None:
    """Entry point. Exit status: 0 done, 1 UsageError, 2 wrong command line, 3 done except for a picture, 130
    interrupted (can be resumed)."""
    gc.set_threshold(20_000)  # a fifth of the start was a search for garbage among the libraries' million objects
    try:
        done = app(standalone_mode=False)
        if isinstance(done, Todo):
            done = run_job(done.job, done.resume, done.quiet, done.numbered)
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
