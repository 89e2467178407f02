"""What every training verb takes in Python beside its own arguments and the settings of its method."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

from unbraid.runs.job import Schedule


class RunOptions(TypedDict, total=False):
    """How a run is done. Each has the same name on the command line."""

    out: str | Path | None
    """The run folder. Default: `runs/NAME-METHOD`."""
    base: str
    """`icons` (embedded), a diffusers folder, a hub id, or a `.safetensors` checkpoint. Default: UNBRAID_BASE, else `icons`."""
    vae: str
    """Another VAE: a folder, a hub id or a file. Default: the base's own."""
    parts: str
    """A folder or hub id with what a single file of Flux.1, SD3.5 or Z-Image lacks: text encoders, tokenizers, VAE."""
    prediction: str
    """`epsilon` or `v`: what the base predicts. Default: what its file declares."""
    vram: str
    """Memory preset: `8`, `12`, `16`, `24` (GB of the card) or `max`, the default."""
    swap: int
    """How many of the denoiser's blocks have their weights on the processor. Default 0."""
    compile: bool
    """Use torch.compile. Default False."""
    graphs: bool
    """Capture steps as CUDA graphs where the device has them. Default True."""
    device: str
    """Where to compute, such as `cuda:1`. Default: the best device."""
    timesteps: str
    """How timesteps are drawn with flow matching: `uniform` or `logit-normal`, if wanted with `+shift=3` or `+dynamic`.
    Default: as published for the base."""
    seed: int
    """The same seed gives the same result. Default 0."""
    previews: int
    """Preview sheets during training; 0: no pictures at all. Default 3."""
    rare: str
    """The token that stands for the subject in prompts. Default `sks`."""
    resolution: int
    """Pixels: pictures are scaled to the area of a square with this side. Default 0: the base's own size."""
    schedule: Schedule
    """How the learning rates fall to 0: `constant` (not at all, the default), `linear` or `cosine`."""
    warm_up: int
    """Steps in which the learning rates rise to their full value. Default 0."""
    batch_size: int
    """Samples of each branch in a step. Default 1."""
    alpha: float
    """New adapters are multiplied by alpha / rank. Default 0: by 1, as if alpha were the rank."""
    optimizer: str
    """`adamw`, `adamw8bit` or `adafactor`, in methods that train with AdamW. Default: AdamW, in 8 bits if the preset has it."""
    templates: Mapping[str, str]
    """Role → template of its prompt, such as `{"content": "a photo of a {rare} {subject}"}`. Default: the method's."""
    config: Path | None
    """TOML file with a table of settings per method. Default: none."""
    thumbnail: bool
    """Put a small picture into the LoRAs. Default True."""
    metadata: bool
    """Put prompts and settings into the LoRAs. Default True."""


def separate(options: Mapping[str, object]) -> tuple[RunOptions, dict[str, object]]:
    """Separate the options of a training verb: those of the run, and the settings of its method."""
    run = {name: value for name, value in options.items() if name in RunOptions.__annotations__}
    return cast(RunOptions, run), {name: value for name, value in options.items() if name not in run}
