"""The commands on whole checkpoints: bake and extract. They only parse, call and print; torch is imported on use."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn

from unbraid.cli.files import Dtype, Energy, Rank, To, dtype_of, source_of
from unbraid.cli.progress import progress_bar

app = typer.Typer(no_args_is_help=True)
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.command()
def bake(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="SDXL, SD1.5 or SD2.1 as one file, or a diffusers UNet file.")
    ],
    loras: Annotated[
        list[str],
        typer.Argument(metavar="LORA[:WEIGHT[:BLOCKS]]...", help="LoRA, LoCon, LoHa, LoKr, DoRA or full changes."),
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors checkpoint to write.")],
    quiet: Quiet = False,
) -> None:
    """Merge LoRAs into a checkpoint.

    For tools that load no LoRAs, or to train on the result.
    Exact in fp32 and rounded once to the checkpoint's dtype; all names, order and other tensors stay as they are. It is read and written
    tensor by tensor, so 7 GB need no memory. A LoRA that does not fit the checkpoint is an error, and nothing is written.

    Example: unbraid bake sdxl.safetensors ink.safetensors:0.8 detail.safetensors:0.5 --out inked.safetensors
    """
    from unbraid.files.bake import bake as run

    def watch(steps: Iterator[int], total: int) -> Iterator[int]:
        with progress_bar(quiet=quiet, count=DownloadColumn()) as bar:
            task = bar.add_task("baking", total=total)
            for step in steps:
                yield step
                bar.advance(task, step)

    done = run(checkpoint, [source_of(text) for text in loras], out, watch)
    typer.echo(f"{done.path}: {done.changed} of {done.tensors} tensors changed, by {done.modules} modules")


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The checkpoint that the other was made from.")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The fine-tuned or merged one.")],
    out: Annotated[Path, typer.Option(help="The LoRA file to write.")],
    rank: Rank = None,
    energy: Energy = None,
    to: To = None,
    dtype: Dtype = None,
    quiet: Quiet = False,
) -> None:
    """Make a LoRA of what differs between two checkpoints.

    BASE with this LoRA is TUNED again, as far as the rank allows.
    Every linear layer and convolution of the UNet and the text encoders; the best approximation by SVD, and its error is printed. What a
    LoRA cannot hold (norms, biases, embeddings, the VAE) is counted and named. A checkpoint in fp16 rounds a small change away: give
    both in fp32 where you have them. LoRAs are written in fp16 unless --dtype says otherwise.

    Example: unbraid extract sdxl.safetensors inked.safetensors --rank 32 --out ink.safetensors
    """
    from unbraid.files.extract import extract as run
    from unbraid.files.merge import Size

    def watch(names: Sequence[str]) -> Iterator[str]:
        with progress_bar(quiet=quiet) as bar:
            yield from bar.track(names, description="extracting")

    done = run(base, tuned, out, Size(rank, energy), to=to or "kohya", dtype=dtype_of(dtype), watch=watch)
    low, high = done.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    error, worst = f"{done.error:.2%}", f"{done.worst[0]:.2%} in {done.worst[1]}"
    typer.echo(f"{done.path}: {done.modules} modules, {ranks}, off by {error} of the change (worst {worst})")
    if done.left:
        typer.echo(f"  warning: {len(done.left)} other tensors differ and are not in it, such as {done.left[0]}")
