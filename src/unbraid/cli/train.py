"""The verbs that make LoRAs: parse, call, print."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unbraid.cli.options import BaseName, Seed
from unbraid.cli.progress import console
from unbraid.cli.run import training
from unbraid.common.errors import UsageError

app = typer.Typer()


@training(app, "split", "unziplora")
def split(
    image: Annotated[Path, typer.Argument(help="One picture.")],
    subject: Annotated[str, typer.Option(help="What is drawn, in a word or two: octopus.")],
    style: Annotated[str, typer.Option(help="How it is drawn: line art.")],
    blocks: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="Which layers are content and which style: b-lora, unziplora, splitflux, b-lora-flux, or a TOML file.",
        ),
    ] = "",
    *,
    given: dict[str, Any],
) -> Any:
    """One image → content.safetensors and style.safetensors."""
    from unbraid.runs.api import split_job

    return split_job(image, subject=subject, style=style, blocks=blocks, **given)


@training(app, "pair", "pair")
def pair(
    before: Annotated[Path, typer.Argument(help="A picture, or a folder of them.")],
    after: Annotated[Path, typer.Argument(help="The same in the style; folders are paired by their names.")],
    subject: Annotated[
        str,
        typer.Option(help="What is drawn, in a word or two. NAME.txt beside a picture before says it for that one."),
    ],
    style: Annotated[str, typer.Option(help="What to call the style: ink.")],
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Another style of `pair`, which this one shall not meet: a free slot is taken. Repeatable."),
    ] = None,
    *,
    given: dict[str, Any],
) -> Any:
    """A picture before and after → style.safetensors.

    For `generate --style-guidance`. Of a single pair also content.safetensors."""
    from unbraid.runs.api import pair_job

    return pair_job(before, after, subject=subject, style=style, beside=beside or (), **given)


@training(app, "learn", "dreambooth")
def learn(
    images: Annotated[list[Path], typer.Argument(help="Pictures of one thing, or folders of them.")],
    prompt: Annotated[
        str,
        typer.Option(help="What to call it: a sks dog. NAME.txt beside NAME.png is that picture's own: one a line."),
    ],
    class_prompt: Annotated[
        str, typer.Option(help="What it is one of: a dog. Preserves what the base draws of it.")
    ] = "",
    class_images: Annotated[
        Path | None, typer.Option(help="Pictures of the class; without, the base draws them.")
    ] = None,
    from_: Annotated[Path | None, typer.Option("--from", metavar="FILE", help="A LoRA to go on from.")] = None,
    *,
    given: dict[str, Any],
) -> Any:
    """Images of one thing → lora.safetensors."""
    from unbraid.runs.api import learn_job

    given |= {"class_prompt": class_prompt, "class_images": class_images, "from_": from_}
    return learn_job(images, prompt=prompt, **given)


@training(app, "zip", "ziplora")
def zip_(
    content: Annotated[Path, typer.Argument(help="A LoRA of a subject.")],
    style: Annotated[Path, typer.Argument(help="A LoRA of a style.")],
    also: Annotated[list[Path] | None, typer.Option(help="A further LoRA; repeatable.")] = None,
    content_images: Annotated[
        Path | None, typer.Option(help="What it was trained on; without, the LoRA draws for itself.")
    ] = None,
    style_images: Annotated[Path | None, typer.Option(help="The same for the style.")] = None,
    content_prompt: Annotated[str, typer.Option(help="What it was trained with, if its file does not say.")] = "",
    style_prompt: Annotated[str, typer.Option(help="The same for the style.")] = "",
    prompt: Annotated[str, typer.Option(help="What to draw in previews.")] = "",
    single: Annotated[bool, typer.Option("--single", help="One file of the ranks' sum.")] = False,
    *,
    given: dict[str, Any],
) -> Any:
    """Two LoRAs → the same two without interference.

    They are used together at full strength."""
    from unbraid.runs.api import zip_job

    given |= {"single": True} if single else {}
    images = {role: where for role, where in (("content", content_images), ("style", style_images)) if where}
    prompts = {"content": content_prompt, "style": style_prompt, "both": prompt}
    return zip_job(content, style, also=also or (), images=images, prompts=prompts, **given)


@training(app, "break", "break")
def break_(
    content: Annotated[list[Path] | None, typer.Option(help="Pictures of a content, or a folder; repeatable.")] = None,
    style: Annotated[list[Path] | None, typer.Option(help="Pictures of a style instead; repeatable.")] = None,
    prompt: Annotated[str, typer.Option(help="What they are: `a sks fox`, or `a cat in ink style`.")] = "",
    partners: Annotated[
        Path | None, typer.Option(help="A folder of pictures of the other kind, each with NAME.txt, its own prompt.")
    ] = None,
    *,
    given: dict[str, Any],
) -> Any:
    """One content or one style → module.safetensors, for `make`."""
    from unbraid.runs.break_make import break_job

    if bool(content) == bool(style):
        raise UsageError("a module is of a content or of a style", "break", "Give --content IMAGE or --style IMAGE.")
    kind = "content" if content else "style"
    return break_job([*(content or style or ())], kind=kind, prompt=prompt, partners=partners, **given)


@training(app, "make", "make")
def make(
    content: Annotated[Path, typer.Argument(help="A content module, or its run folder.")],
    style: Annotated[Path, typer.Argument(help="A style module, or its run folder.")],
    out: Annotated[Path, typer.Option(help="Folder for merged.safetensors.")],
    fine_tune: Annotated[
        int | None,
        typer.Option(
            help="Steps of training on both; 0: none, done at once. Default: the base's own with pictures, else 0."
        ),
    ] = None,
    content_images: Annotated[
        Path | None, typer.Option(help="What it was learnt from; without, the module draws for itself.")
    ] = None,
    style_images: Annotated[Path | None, typer.Option(help="The same for the style.")] = None,
    prompt: Annotated[str, typer.Option(help="Of both together: for early stopping and previews.")] = "",
    *,
    given: dict[str, Any],
) -> Any:
    """A content and a style module → one LoRA, merged.safetensors."""
    from unbraid.runs.break_make import join, make_job, trains
    from unbraid.runs.run_options import separate

    images = {role: where for role, where in (("content", content_images), ("style", style_images)) if where}
    settings = {name: value for name, value in separate(given)[1].items() if name != "method"}
    if not trains(fine_tune, images, settings):
        print(join(content, style, out / "merged.safetensors"))
        return None
    return make_job(content, style, fine_tune=fine_tune, images=images, prompt=prompt, out=out, **given)


@app.command()
def matrix(
    content: Annotated[list[Path], typer.Option(help="A content module, or its run folder; repeatable.")],
    style: Annotated[list[Path], typer.Option(help="A style module, or its run folder; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the files and matrix.png.")],
    base: BaseName = "",
    seed: Seed = 0,
) -> None:
    """Every content module with every style module → LoRAs.

    As many files as pairs, and a sheet of what they draw."""
    from unbraid.runs.break_make import matrix as made

    with console.status("putting together"):
        for file in made(content, style, out, base=base, seed=seed):
            print(file)
