"""`unbraid studio`: the window in the browser."""

import os
import signal
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from unbraid.cli.progress import console
from unbraid.common.errors import UsageError

app = typer.Typer()
PASSWORD = "UNBRAID_STUDIO_PASSWORD"


@app.command()
def studio(
    folder: Annotated[Path, typer.Option(help="Where everything is kept; nothing outside of it is shown.")] = Path(
        "studio"
    ),
    base: Annotated[
        list[str] | None, typer.Option(help="A base model to offer beside icons, as for `split`; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Who can reach it: 127.0.0.1 this machine alone, 0.0.0.0 all.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    name: Annotated[
        list[str] | None, typer.Option(help="A name of this machine that browsers may use; repeatable.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Open a window in the browser.

    Split, pair, combine and generate, with a queue of trainings that outlive it. Others can reach it only with --host, and with the password in the environment variable UNBRAID_STUDIO_PASSWORD."""
    from unbraid.studio.safety import keep_to, open_home

    bases = ["icons", *(str(Path(one).resolve()) if Path(one).exists() else one for one in base or ())]
    home = open_home(folder)
    keep_to(home)
    with console.status("loading", spinner="line"):
        try:
            from unbraid.studio.pages.app import serve
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("gradio", "uvicorn", "fastapi"):
                raise
            fix = 'Install it: pip install "unbraid[studio]".'
            raise UsageError("gradio is not installed", "studio", fix) from error
    signal.signal(signal.SIGINT, signal.default_int_handler)  # trainings inherit whether Ctrl-C is ignored
    if open_ and port:
        threading.Timer(2, webbrowser.open, [f"http://{host}:{port}"]).start()
    serve(home, bases, (host, port), os.environ.get(PASSWORD, ""), name or ())
