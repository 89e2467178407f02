"""How a base is loaded and trained within a card's memory: the presets of `--vram`, another VAE, another prediction type."""

from collections.abc import Mapping
from dataclasses import dataclass

from unbraid.common.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """What is done about memory. `half`: frozen weights and activations in bf16 (adapters stay fp32). `fp8`: the UNet's linear and
    convolutional weights are kept in fp8. `adam8`: AdamW's moments in 8 bits. `at_once`: branches in one forward pass, each of which costs less than
    one by itself (`bench.speed passes`). `rank`: that
    two adapters on all of SDXL's attention should not exceed at 1024²."""

    name: str
    half: bool = True
    checkpointing: bool = True
    adam8: bool = True
    fp8: bool = False
    at_once: int = 1
    rank: int = 64


MAX = Preset("max", half=False, checkpointing=False, adam8=False, at_once=4, rank=128)  # bf16 on CUDA all the same
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
class Loading:
    """How to open a base. `vae`: a folder, hub id or file in place of its own. `prediction`: `epsilon` or `v`, where the base does
    not say it. `vram`: the name of a preset, in GB. `compile`: its transformer blocks, by torch.compile, for training.
    `graphs`: passes are captured as CUDA graphs, where the device has them. `device`: such as cuda:1; empty: the best there is."""

    vae: str = ""
    prediction: str = ""
    vram: str = "max"
    compile: bool = False
    graphs: bool = True
    device: str = ""

    @property
    def preset(self) -> Preset:
        if self.vram not in PRESETS:
            raise UsageError(f"there is no preset {self.vram!r}", "--vram", f"There are: {', '.join(PRESETS)}.")
        return PRESETS[self.vram]


AS_IT_IS = Loading()


def advice(preset: Preset) -> str:
    """What to do when a preset was not enough."""
    names = list(PRESETS)
    after = names[names.index(preset.name) + 1 :]
    if after:
        return f"Try --vram {after[0]}."
    return "Try a lower rank (--set rank=8), smaller pictures, or an SD1.5 base."
