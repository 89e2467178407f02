"""Base models: load, encode prompts and images, noise, target, predict, and what is known of their blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from unbraid.bases.compiling import compile_blocks
from unbraid.bases.families import family_of
from unbraid.bases.families.family import Family, Prompt
from unbraid.bases.families.noising import Diffusion
from unbraid.bases.pipeline import Pipeline, open_pipeline
from unbraid.bases.presets import AS_IT_IS, Loading
from unbraid.bases.savings import save_memory
from unbraid.common.errors import UsageError
from unbraid.core.graphs import CudaExecutor, Graphs
from unbraid.core.recipe import Denoiser, Sample, Shared

TILE = 512  # pixels
DRAWING = 6 * 2**30  # bytes for a picture of 1024 px: the passes, and the VAE in full precision
MOST_BATCHES = 16  # of prompts, whose embeddings are kept: 0.3 MB a row in SDXL


@dataclass(frozen=True)
class Picture:
    """An encoded image: moments of its scaled latent `[c, h, w]`, and SDXL's six size numbers."""

    mean: Tensor
    std: Tensor
    sizes: Tensor
    prompts: tuple[str, ...] = ()  # roles of its own captions, of which one is drawn with it
    weight: Tensor | None = None  # [1, h, w], of each place of the latent in the loss


@dataclass
class Base:
    """A loaded base model. Sampling uses `pipe` as it is; training uses its parts."""

    name: str
    pipe: Pipeline
    device: torch.device
    graphs: bool = True  # whether passes are captured as CUDA graphs
    family: Family = field(init=False)
    process: Diffusion = field(init=False)
    _told: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.family = family_of(self.pipe)
        self.process = self.family.process(self.pipe.scheduler.config, self.name)

    @property
    def denoiser(self) -> Any:
        """The network that is trained: a module of diffusers, with its `config`."""
        return getattr(self.pipe, self.family.network.part)

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipe.vae

    @property
    def step(self) -> int:
        """Sides of pictures are multiples of this many pixels: 64, as in the buckets that the large bases were trained in; for smaller
        ones what they can take: the VAE's factor times the denoiser's."""
        factor = self.pipe.vae_scale_factor * self.family.network.factor(self.denoiser.config)
        return 64 if self.size >= 512 else factor

    @property
    def size(self) -> int:
        """The side, in pixels, of the square pictures that the base was trained on."""
        return self.family.network.size(self.denoiser.config) * self.pipe.vae_scale_factor

    @property
    def lora_metadata(self) -> dict[str, str]:
        """What a LoRA's metadata says of this base beyond its family."""
        return self.family.lora_metadata(self.pipe)

    @torch.no_grad()
    def encode_prompt(self, text: str) -> Prompt:
        """Encode as the pipeline does; a longer text in chunks."""
        return self.family.encode_text(self.pipe, text, self.device)

    def alike(self, prompts: Mapping[str, Prompt]) -> dict[str, Prompt]:
        """Prompts that can be in one batch: shorter ones are followed by empty chunks, blank ones by zeros. Text encoders must be there."""
        most = max(len(prompt.embeds) for prompt in prompts.values())
        if all(len(prompt.embeds) == most for prompt in prompts.values()):
            return dict(prompts)
        empty = self.encode_prompt("").embeds
        out = {}
        for role, prompt in prompts.items():
            tail = empty if bool(prompt.embeds.any()) else torch.zeros_like(empty)
            more = (most - len(prompt.embeds)) // len(empty)
            out[role] = replace(prompt, embeds=torch.cat([prompt.embeds, *[tail] * more]))
        return out

    def encode_negative(self, text: str = "") -> Prompt:
        """What classifier-free guidance moves away from; where there is no text, zeros if the base wants them (SDXL)."""
        prompt = self.encode_prompt(text)
        if text or not self.pipe.config.get("force_zeros_for_empty_prompt"):
            return prompt
        return Prompt(
            torch.zeros_like(prompt.embeds), None if prompt.pooled is None else torch.zeros_like(prompt.pooled)
        )

    @torch.no_grad()
    def encode_picture(self, pixels: Float[Tensor, "3 h w"], sizes: Sequence[int]) -> Picture:
        """Moments of the scaled latent of an image in -1..1. The VAE runs in full precision: fp16 ones overflow."""
        vae = self.vae.to(self.device, torch.float32)  # type: ignore[call-arg]
        posterior = vae.encode(pixels[None].to(self.device)).latent_dist  # type: ignore[union-attr]
        shift = vae.config.get("shift_factor") or 0.0
        scale = vae.config["scaling_factor"]
        mean, std = (posterior.mean[0] - shift) * scale, posterior.std[0] * scale
        if not bool(torch.isfinite(mean).all()):
            raise UsageError("the VAE gave NaN latents", self.name, "Use another VAE (for SDXL: an fp16-safe one).")
        return Picture(mean, std, torch.tensor(sizes, dtype=torch.float32, device=self.device))

    def release(self, tiles: bool = False) -> None:
        """For training, once all prompts and pictures are encoded: the text encoders are dropped, and the VAE leaves the
        accelerator, to which `sample.generate` brings it back for as long as something is drawn; in `tiles`, if wanted."""
        for part in ("text_encoder", "text_encoder_2"):
            if part in self.pipe.components:
                setattr(self.pipe, part, None)
        self.vae.to("cpu")  # type: ignore[arg-type]
        if tiles:
            self.vae.enable_tiling()
            self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = TILE, TILE // self.pipe.vae_scale_factor
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def new_graphs(self) -> Graphs | None:
        """A place for captured passes over this base; None on a device that has no CUDA graphs, and where they are not wanted."""
        return Graphs(CudaExecutor(self.device)) if self.graphs and self.device.type == "cuda" else None

    def short_of_memory(self) -> bool:
        """Whether drawing might not fit beside captured steps, which keep their activations."""
        return self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0] < DRAWING

    def conditions(self, prompts: Sequence[Prompt], sizes: Tensor) -> dict[str, Any]:
        """What the denoiser, or a ControlNet, reads beside the noisy latents; `prompts` and `sizes [b, 6]` one per row."""
        dtype = self.denoiser.dtype
        more = self.family.conditions(prompts, sizes, dtype)
        return {"encoder_hidden_states": self._texts((dtype, *prompts), prompts), **more}

    def _texts(self, key: tuple[object, ...], prompts: Sequence[Prompt]) -> Tensor:
        """The embeddings of a batch, `[b, tokens, channels]`: for the same prompts the same tensor, by which adapted layers know that
        they have its keys and values already."""
        if key not in self._told:
            if len(self._told) == MOST_BATCHES:
                self._told.clear()
            self._told[key] = torch.stack([prompt.embeds for prompt in prompts]).to(self.denoiser.dtype)
        return self._told[key]

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[Prompt], sizes: Tensor, **residuals: Any) -> Tensor:
        """The denoiser's raw prediction for a batch, as `noisy`; `residuals`: a ControlNet's outputs, under the denoiser's names."""
        told = self.conditions(prompts, sizes)
        return self.denoiser(noisy.to(self.denoiser.dtype), t, **told, **residuals).sample


class RunData:
    """A base with the pictures and prompts of one run, by role: the trainer's `Denoiser`."""

    def __init__(self, base: Base, pictures: Mapping[str, Sequence[Picture]], prompts: Mapping[str, Prompt]) -> None:
        self.base, self.pictures, self.encoded = base, pictures, prompts
        self.prompts: Mapping[str, Tensor] = {role: prompt.embeds for role, prompt in prompts.items()}
        self.graphs = base.new_graphs()

    def constants(self) -> list[Tensor]:
        return list(self.base._told.values())

    def draw(self, images: Sequence[str], shared: frozenset[Shared], rng: torch.Generator) -> list[Sample]:
        """One noisy latent per branch: x_t, t and its target, drawn on the CPU so that a seed means the same everywhere."""
        kept: dict[str, Tensor] = {}
        return [self._draw_one(self.pictures[role], shared, kept, rng) for role in images]

    def _draw_one(
        self, pictures: Sequence[Picture], shared: frozenset[Shared], kept: dict[str, Tensor], rng: torch.Generator
    ) -> Sample:
        picture = pictures[int(torch.randint(len(pictures), (), generator=rng))]
        shape, device = picture.mean.shape, self.base.device
        latent = picture.mean + picture.std * sent(torch.randn(shape, generator=rng), device).to(picture.std)
        if "timestep" not in shared or "timestep" not in kept:
            kept["timestep"] = sent(self.base.process.draw_timestep(rng), device)
        if "noise" not in shared or "noise" not in kept:
            kept["noise"] = sent(torch.randn(shape, generator=rng), device).to(picture.mean)
        t = kept["timestep"]
        noisy, target = self.base.process.corrupt(latent[None], kept["noise"][None], t)
        some = picture.prompts
        prompt = some[int(torch.randint(len(some), (), generator=rng))] if len(some) > 1 else (*some, None)[0]
        weight = None if picture.weight is None else picture.weight[None]
        return Sample(noisy, t, target, picture.sizes[None], prompt, weight=weight)

    def predict(self, samples: Sequence[Sample], prompts: Sequence[str]) -> Tensor:
        noisy = torch.cat([sample.noisy for sample in samples])
        t = torch.cat([sample.t for sample in samples])
        sizes = torch.cat([sample.sizes for sample in samples])
        encoded = [self.encoded[sample.prompt or role] for sample, role in zip(samples, prompts, strict=True)]
        return self.base.predict(noisy, t, encoded, sizes)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """From the CPU to a device, without waiting for what the device is doing."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def joined(models: Mapping[str, Denoiser]) -> RunData:
    """RunData of one base as one, with prompts by KEY/ROLE; it draws nothing."""
    found = {key: model for key, model in models.items() if isinstance(model, RunData)}
    prompts = {f"{key}/{role}": prompt for key, one in found.items() for role, prompt in one.encoded.items()}
    return RunData(next(iter(found.values())).base, {}, prompts)


def load(name: str = "icons", device: str | None = None, loading: Loading = AS_IT_IS) -> Base:
    """Load a base: `icons` (embedded), a diffusers folder, a hub id, or a single-file checkpoint. fp32 on CPU and MPS, bf16 on
    CUDA, unless `loading` says something else."""
    where = found_device(device or loading.device)
    if where.type == "cuda":
        torch.cuda.set_device(where)  # CUDA graphs are captured on the current card
    dtype = torch.bfloat16 if where.type == "cuda" or loading.preset.half else torch.float32
    pipe = open_pipeline(name, dtype, loading.vae, loading.prediction)
    denoiser = getattr(pipe, family_of(pipe).network.part)
    save_memory(denoiser, where, loading.preset)
    if loading.compile:
        compile_blocks(denoiser)
    pipe.to(where)
    return Base(name, pipe, where, loading.graphs)


def found_device(name: str = "") -> torch.device:
    """A device by its name, or the best that there is. UsageError for one that is not there."""
    try:
        device = torch.device(name or pick_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's, for a name, a number or a kind that it does not have
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there += ["mps"] if torch.backends.mps.is_available() else []
        fix = f"There are: {', '.join([*there, 'cpu'])}."
        raise UsageError(f"there is no device {name!r}", "--device", fix) from error
    return device


def pick_device() -> str:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
