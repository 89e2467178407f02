"""Options for opening a base, and the memory presets of `--vram`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from unbraid.common.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """How memory is saved.

    half: frozen weights and activations in bf16; adapters stay fp32. checkpointing: gradient checkpointing. adam8: AdamW's
    moments in 8 bits. fp8: the UNet's linear and convolutional weights are stored in fp8. at_once: branches per forward
    pass; several in one pass are faster than one after the other (`python -m tools.speed passes`). rank: the highest
    advisable rank for two adapters on all of SDXL's attention at 1024×1024 px."""

    name: str
    half: bool = True
    checkpointing: bool = True
    adam8: bool = True
    fp8: bool = False
    at_once: int = 1
    rank: int = 64


MAX = Preset(
    "max", half=False, checkpointing=False, adam8=False, at_once=4, rank=128
)  # on CUDA the weights are bf16 even so
PRESETS: Mapping[str, Preset] = {
    one.name: one
    for one in (
        MAX,
        Preset("24", checkpointing=False, adam8=False),
        Preset("16", adam8=False),
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
    as published for the base. adam8bit: whether AdamW's moments have 8 bits;
    None: as the preset has it. swap: how many of the denoiser's blocks have their weights on the processor
    (`unbraid.core.swap`), which needs gradient checkpointing."""

    vram: str = "max"
    compile: bool = False
    graphs: bool = True
    device: str = ""
    timesteps: str = ""
    adam8bit: bool | None = None
    swap: int = 0

    @property
    def preset(self) -> Preset:
        """The memory preset, with the AdamW that was chosen, and with gradient checkpointing if blocks are swapped. UsageError
        if there is no such preset, or if blocks cannot be swapped."""
        if self.vram not in PRESETS:
            raise UsageError(f"there is no preset {self.vram!r}", "--vram", f"There are: {', '.join(PRESETS)}.")
        if self.swap and self.compile:
            raise UsageError("compiled blocks cannot be swapped", "--swap", "Leave out --compile.")
        chosen = replace(PRESETS[self.vram], checkpointing=PRESETS[self.vram].checkpointing or self.swap > 0)
        return chosen if self.adam8bit is None else replace(chosen, adam8=self.adam8bit)


AS_IT_IS = Loading()


def advice(preset: Preset) -> str:
    """What to try when this preset was not enough."""
    names = list(PRESETS)
    after = names[names.index(preset.name) + 1 :]
    if after:
        return f"Try --vram {after[0]}."
    return "Try a lower rank (--set rank=8), smaller pictures, or an SD1.5 base."
