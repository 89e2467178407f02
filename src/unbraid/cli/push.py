"""`unbraid push`: a run on the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from unbraid.cli.run import console, loading

app = typer.Typer()


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    name: Annotated[str, typer.Argument(metavar="HUB/NAME", help="Where to: ada/octopus.")],
    dry_run: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Upload nothing; write what would be uploaded.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="A folder of pictures that `generate` drew with the LoRAs; those in RUN are found."),
    ] = None,
    license_: Annotated[
        str, typer.Option("--license", help="The hub's id of a licence; without, that of the base, where it is known.")
    ] = "",
    base_model: Annotated[
        str, typer.Option(help="The base's name on the hub, if it was trained on a local copy.")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="A new repository is for you alone.")] = False,
) -> None:
    """Publish a run on the Hugging Face hub.

    The LoRAs, a model card, and pictures that they drew. No picture that they were trained on is published, unless their files hold one as
    a thumbnail (--no-thumbnail)."""
    with loading("the run"):
        from unbraid.runs.push import push as publish

    more = {"pictures": pictures, "license": license_, "base_model": base_model, "private": private}
    with console.status("writing" if dry_run else "uploading"):
        print(publish(run, name, dry_run=dry_run, **more))  # type: ignore[arg-type]
