"""The options of the training verbs on the command line. Other verbs use some of them."""

import inspect
from pathlib import Path
from typing import Annotated

import typer

from unbraid.common.errors import UsageError

Out = Annotated[
    Path | None,
    typer.Option(help="Run folder; default runs/NAME-METHOD, or the first of runs/NAME-METHOD-2, … that is free."),
]
BaseName = Annotated[
    str,
    typer.Option(
        "--base",
        help="icons (embedded), a diffusers folder, a hub id, or a .safetensors checkpoint: SDXL, SD1.5, SD2.1, Flux.1, SD3.5,"
        " Z-Image. Default: the environment variable UNBRAID_BASE, else icons.",
    ),
]
Vae = Annotated[
    str,
    typer.Option(metavar="FOLDER|HUB_ID|FILE", help="Another VAE; for SDXL, such as madebyollin/sdxl-vae-fp16-fix."),
]
Parts = Annotated[
    str,
    typer.Option(
        metavar="FOLDER|HUB_ID",
        help="What a single file of Flux.1, SD3.5 or Z-Image lacks: text encoders, tokenizers, VAE.",
    ),
]
Prediction = Annotated[
    str, typer.Option(metavar="epsilon|v", help="What the base predicts, where its file does not say it.")
]
Timesteps = Annotated[
    str,
    typer.Option(
        metavar="DENSITY[+SHIFT]",
        help="How timesteps are drawn with flow matching (Flux, SD3.5, Z-Image): uniform or logit-normal, +shift=3 or +dynamic.",
    ),
]
Vram = Annotated[
    str, typer.Option(metavar="8|12|16|24|max", help="GB of the card: how much is saved, see docs/bases.md.")
]
Swap = Annotated[
    int,
    typer.Option(
        metavar="N", help="N blocks of the model have their weights on the processor: less of the card, slower."
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile: a minute at the start, quicker steps.")]
Graphs = Annotated[
    bool,
    typer.Option("--graphs/--no-graphs", help="CUDA graphs, on a card that has them: steps several times as fast."),
]
Device = Annotated[str, typer.Option(metavar="cuda:1", help="Where to compute; without, the best that there is.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Config = Annotated[Path | None, typer.Option(help="TOML file with a table per method; a run.toml will do.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting of the method; repeatable.")
]
Method = Annotated[str, typer.Option(help="Which method; all are listed below.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors and the files made.")]
Previews = Annotated[int, typer.Option(help="How many preview sheets during training.")]
Rare = Annotated[str, typer.Option(help="The token that stands for the subject in prompts.")]
Resolution = Annotated[
    int, typer.Option(help="Pictures are scaled to the area of a square with this side, in pixels; 0: as the base.")
]
Schedule = Annotated[
    str, typer.Option(metavar="constant|linear|cosine", help="How the learning rates fall to 0 at the end.")
]
WarmUp = Annotated[int, typer.Option(help="Steps in which the learning rates rise to their full value.")]
BatchSize = Annotated[int, typer.Option(help="Samples of each branch in a step; memory decides how many share a pass.")]
Alpha = Annotated[float, typer.Option(help="New adapters are multiplied by alpha / rank; 0: by 1.")]
Optimizer = Annotated[
    str,
    typer.Option(
        metavar="adamw|adamw8bit|adafactor", help="Default: AdamW, with moments in 8 bits where --vram has it."
    ),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(metavar="ROLE=TEXT", help="Another prompt for a role: 'content=a photo of a {rare} {subject}'."),
]
Thumbnail = Annotated[bool, typer.Option("--thumbnail/--no-thumbnail", help="A small picture in the LoRAs.")]
Shard = Annotated[str, typer.Option(metavar="I/N", help="Only every N-th run from the I-th on; 0/3 to 2/3.")]
Ray = Annotated[
    str,
    typer.Option(
        metavar="local|auto|ADDRESS",
        help="Train on Ray: on this machine, on the cluster that it belongs to, or on another. Needs unbraid[ray].",
    ),
]
Gpus = Annotated[float | None, typer.Option(help="With --ray: cards of a run, such as 0.25; default 1.")]
Cpus = Annotated[float, typer.Option(help="With --ray: cores of a run.")]
Retries = Annotated[int, typer.Option(help="With --ray: tries after a lost worker or a full disk.")]
Metadata = Annotated[bool, typer.Option("--metadata/--no-metadata", help="Prompts and settings in the LoRAs.")]


def shared(
    out: Out = None,
    base: BaseName = "",
    vae: Vae = "",
    parts: Parts = "",
    prediction: Prediction = "",
    vram: Vram = "max",
    swap: Swap = 0,
    compile: Compile = False,
    graphs: Graphs = True,
    device: Device = "",
    timesteps: Timesteps = "",
    seed: Seed = 0,
    previews: Previews = 3,
    rare: Rare = "sks",
    resolution: Resolution = 0,
    schedule: Schedule = "constant",
    warm_up: WarmUp = 0,
    batch_size: BatchSize = 1,
    alpha: Alpha = 0.0,
    optimizer: Optimizer = "",
    template: Templates = None,
    thumbnail: Thumbnail = True,
    metadata: Metadata = True,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """The options of every training verb, declared once: `training` reads them from this signature."""


SHARED = inspect.signature(shared).parameters


def check_ray(ray: str, gpus: float | None) -> None:
    """Raise UsageError for options of Ray without Ray."""
    if gpus is not None and not ray:
        raise UsageError("goes with --ray", "--gpus", "Add --ray local, auto or an address, or leave it out.")
