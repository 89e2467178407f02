"""Every size and rate of the recipe, in one place: one preset for a CPU, one for a GPU."""

from dataclasses import dataclass

TOKENS = 24  # longest prompt, in tokens; captions need at most 14
SIZE_IDS = 32  # sinusoidal width of each of SDXL's six size and crop numbers


@dataclass(frozen=True)
class Vae:
    channels: tuple[int, ...] = (
        24,
        48,
        96,
    )  # three levels: 4× downsampling; at 8× attention, and so LoRAs, see 4×4 cells
    latent: int = 8  # channels; at 64 px, four of them would keep too little
    crop: int = 32  # trained on crops first: the network is convolutional, and crops are 4× cheaper
    whole: float = 0.3  # share of the steps, the last ones, on whole pictures: crops are mostly borders
    batch: int = 12  # crops per worker
    steps: int = 7_000
    rate: float = 1e-3
    muon: float = 0.02  # AdamW alone is far slower here (docs/LOG.md)
    ema: float = 0.998
    kl: float = 1e-6
    hardening: int = 8_000  # further steps of the decoder alone, on noised latents
    noise: float = 0.3  # at most, relative to the latents' deviation


@dataclass(frozen=True)
class UNet:
    channels: tuple[int, int, int] = (48, 96, 192)
    depth: tuple[int, int, int] = (1, 1, 1)  # transformer blocks per attention, SDXL has (0, 2, 10)
    head: int = 32
    text: int = 96  # width of each of the two text encoders
    batch: int = 32  # per worker
    steps: int = 8_000
    rate: float = 1e-3
    muon: float | None = 0.02
    warmup: int = 200
    ema: float = 0.999
    subjects: int | None = 80


@dataclass(frozen=True)
class Config:
    size: int  # pixels
    vae: Vae
    unet: UNet


CPU = Config(64, Vae(), UNet())
GPU = Config(
    128,
    Vae((32, 64, 96, 128), latent=4, crop=64, batch=256, steps=12_000),
    UNet((64, 128, 256), (1, 1, 2), batch=512, steps=40_000, rate=1.5e-3, warmup=500, ema=0.9995, subjects=None),
)
PRESETS = {"cpu": CPU, "gpu": GPU}
