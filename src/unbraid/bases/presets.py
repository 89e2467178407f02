"""Options for opening a base, and the memory presets of `--vram`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from unbraid.common.errors import UsageError, suggestion


@dataclass(frozen=True)
class Moments:
    """What an optimiser keeps for each trained number. bytes: how much; for Adafactor at rank 16. mark: the name of a tensor
    of its state that no other one has."""

    bytes: float
    mark: str


OPTIMIZERS: Mapping[str, Moments] = {
    "adamw": Moments(8.0, "exp_avg"),
    "adamw8bit": Moments(2.03, "mean"),
    "adafactor": Moments(0.3, "RMS"),
}


@dataclass(frozen=True)
class Preset:
    """How memory is saved.

    half: frozen weights and activations in bf16; adapters stay fp32. checkpointing: gradient checkpointing. optimizer: one
    of `OPTIMIZERS`. fp8: the UNet's linear and convolutional weights are stored in fp8. at_once: branches per forward
    pass; several in one pass are faster than one after the other (`python -m tools.speed passes`). rank: the highest
    advisable rank for two adapters on all of SDXL's attention at 1024×1024 px."""

    name: str
    half: bool = True
    checkpointing: bool = True
    optimizer: str = "adamw8bit"
    fp8: bool = False
    at_once: int = 1
    rank: int = 64


MAX = Preset(
    "max", half=False, checkpointing=False, optimizer="adamw", at_once=4, rank=128
)  # on CUDA the weights are bf16 even so
PRESETS: Mapping[str, Preset] = {
    one.name: one
    for one in (
        MAX,
        Preset("24", checkpointing=False, optimizer="adamw"),
        Preset("16", optimizer="adamw"),
        Preset("12", rank=32),
        Preset("8", fp8=True, rank=16),
    )
}


@dataclass(frozen=True)
class Files:
    """Where a base is, beside its name.

    vae: a folder, hub id or file to use in place of the base's own VAE. prediction: `epsilon` or `v`, for a base whose
    files do not state it. parts: a folder or hub id with what a transformer's single file lacks: text encoders, tokenizers,
    VAE."""

    vae: str = ""
    prediction: str = ""
    parts: str = ""


@dataclass(frozen=True)
class Loading(Files):
    """How to open a base.

    vram: the name of a preset, in GB. compile: whether torch.compile compiles the transformer
    blocks for training. graphs: whether passes are captured as CUDA graphs, if the device has them. device: such as
    cuda:1; empty for the best one. timesteps: how they are drawn in training (`unbraid.bases.families.flow.parsed`); empty:
    as published for the base. optimizer: one of `OPTIMIZERS`, in place of AdamW in methods that train with it; empty: AdamW,
    with 8-bit moments if the preset has them. swap: how many of the denoiser's blocks have their weights on the processor
    (`unbraid.core.swap`), which needs gradient checkpointing."""

    vram: str = "max"
    compile: bool = False
    graphs: bool = True
    device: str = ""
    timesteps: str = ""
    optimizer: str = ""
    swap: int = 0

    @property
    def preset(self) -> Preset:
        """The memory preset, with the optimiser that was chosen, and with gradient checkpointing if blocks are swapped.
        UsageError if there is no such preset or optimiser, or if blocks cannot be swapped."""
        if self.vram not in PRESETS:
            raise UsageError(f"there is no preset {self.vram!r}", "--vram", f"There are: {', '.join(PRESETS)}.")
        if self.swap and self.compile:
            raise UsageError("compiled blocks cannot be swapped", "--swap", "Leave out --compile.")
        chosen = replace(PRESETS[self.vram], checkpointing=PRESETS[self.vram].checkpointing or self.swap > 0)
        if not self.optimizer:
            return chosen
        if self.optimizer not in OPTIMIZERS:
            fix = suggestion(self.optimizer, OPTIMIZERS)
            raise UsageError(f"there is no optimiser {self.optimizer!r}", "--optimizer", fix)
        return replace(chosen, optimizer=self.optimizer)


AS_IT_IS = Loading()


def advice(preset: Preset) -> str:
    """What to try when this preset was not enough."""
    names = list(PRESETS)
    after = names[names.index(preset.name) + 1 :]
    if after:
        return f"Try --vram {after[0]}."
    return "Try a lower rank (--set rank=8), smaller pictures, or an SD1.5 base."
