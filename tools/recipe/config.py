"""Every size and rate of the recipe, in one place: the sizes of the base, and two presets of how long it is trained, and how."""

from dataclasses import dataclass

TOKENS = 24  # longest prompt, in tokens; captions need at most 14
SIZE_IDS = 32  # sinusoidal width of each of SDXL's six size and crop numbers


@dataclass(frozen=True)
class Sizes:
    pixels: int = 128
    vae: tuple[int, ...] = (32, 64, 128, 128)  # channels of four levels: 8× downsampling
    latent: int = 16  # channels: with four, line art would lose its lines
    unet: tuple[int, int, int] = (64, 128, 256)  # attention at 8×8 and 4×4 cells
    depth: tuple[int, int, int] = (1, 1, 1)  # transformer blocks per attention; SDXL has (0, 2, 10)
    head: int = 32
    text: int = 128  # width of each of the two text encoders


@dataclass(frozen=True)
class DitSizes:
    """The transformer with joint attention, on the same latents: 64 tokens of the picture, 24 of the text."""

    width: int = 256
    layers: int = 6
    head: int = 64


@dataclass(frozen=True)
class Schedule:
    """One training: a linear warm-up, then a linear fall to zero at the last step."""

    batch: int  # per worker
    steps: int
    rate: float  # of AdamW
    muon: float | None  # of Muon, for the inner matrices; AdamW alone is far slower here (docs/LOG.md)
    warmup: int
    ema: float


@dataclass(frozen=True)
class Schedules:
    vae: Schedule
    unet: Schedule
    decoder: Schedule  # further steps of the decoder alone, on noised latents


SIZES = Sizes()
DIT = DitSizes()
DIT_SCHEDULE = Schedule(batch=32, steps=4_000, rate=1e-3, muon=0.02, warmup=100, ema=0.999)
PRESETS: dict[str, Schedules] = {
    # From random weights, on one GPU. Not run yet in this form.
    "fresh": Schedules(
        vae=Schedule(batch=96, steps=4_000, rate=1e-3, muon=0.02, warmup=50, ema=0.998),
        unet=Schedule(batch=512, steps=12_000, rate=1e-3, muon=0.02, warmup=200, ema=0.999),
        decoder=Schedule(batch=64, steps=1_000, rate=1e-3, muon=0.01, warmup=50, ema=0.998),
    ),
    # On from a finished base, at small rates, on a CPU: hours.
    "further": Schedules(
        vae=Schedule(batch=4, steps=2_400, rate=6e-4, muon=0.012, warmup=30, ema=0.995),
        unet=Schedule(batch=32, steps=1_100, rate=2e-4, muon=0.004, warmup=100, ema=0.998),
        decoder=Schedule(batch=4, steps=300, rate=3e-4, muon=0.004, warmup=30, ema=0.99),
    ),
}
PLAIN = 0.65  # share of pictures without a filter: the art styles are harder to tell apart than the filters
KL = 1e-6  # weight of the posterior's divergence from a standard normal
NOISE = 0.2  # at most, of the noise added to latents in training the autoencoder, relative to their deviation
DECODER_NOISE = 0.3  # the same for the decoder's further steps
ANCHOR = (
    0.5  # weight of the squared distance of latents from those of the base that training started from, in deviations
)
