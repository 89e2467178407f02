"""Base models: loading them, encoding prompts and pictures, adding noise, predicting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from unbraid.bases.compiling import compile_blocks
from unbraid.bases.devices import found_device
from unbraid.bases.families import family_of
from unbraid.bases.families.family import Family, Prompt
from unbraid.bases.families.noising import Process
from unbraid.bases.families.segments import rows
from unbraid.bases.pipeline import Pipeline, open_pipeline
from unbraid.bases.presets import AS_IT_IS, Loading
from unbraid.bases.samples import Picture, drawn
from unbraid.bases.savings import moved, save_memory
from unbraid.common.errors import UsageError
from unbraid.common.interrupts import interrupts_kept
from unbraid.core.adapters import compute_dtype
from unbraid.core.graphs import CudaExecutor, Graphs
from unbraid.core.lora import Noise
from unbraid.core.recipe import Denoiser, Sample, Shared

TILE = 512  # pixels: side of the tiles in which the VAE decodes, if it decodes in tiles
DRAWING = 6 * 2**30  # bytes that drawing a picture of 1024 px needs: the passes, and the VAE in full precision
MOST_BATCHES = 16  # batches of prompts whose embeddings are cached; 0.3 MB per row in SDXL


@dataclass
class Base:
    """A loaded base model. Sampling uses `pipe` as it is; training uses its parts."""

    name: str
    pipe: Pipeline
    device: torch.device
    graphs: bool = True  # whether to capture passes as CUDA graphs
    timesteps: str = ""  # how they are drawn in training; empty: as published for the family
    guidance: float = 1.0  # for denoisers that take a guidance scale as an input, such as Flux.1-dev's
    family: Family = field(init=False)
    process: Process = field(init=False)
    embeddings: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False)  # a cache

    def __post_init__(self) -> None:
        self.family = family_of(self.pipe)
        self.process = self.family.network.process(self.pipe.scheduler.config, self.name, self.timesteps)
        self.process.to(self.device)

    @property
    def denoiser(self) -> Any:
        """The network that LoRAs are trained on: a diffusers model with its `config`."""
        return getattr(self.pipe, self.family.network.part)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the denoiser computes in."""
        return compute_dtype(self.denoiser)

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipe.vae

    @property
    def step(self) -> int:
        """The sides of pictures must be multiples of this many pixels. Large bases were trained with multiples of 64. For
        smaller bases it is the least that they accept: the VAE's factor times the denoiser's."""
        factor = self.pipe.vae_scale_factor * self.family.network.factor(self.denoiser.config)
        return 64 if self.size >= 512 else factor

    @property
    def size(self) -> int:
        """The side, in pixels, of the square pictures that the base was trained on."""
        return self.family.network.side(self.pipe)

    @property
    def lora_metadata(self) -> dict[str, str]:
        """Metadata that distinguishes this base's LoRAs from others of the same family."""
        return self.family.lora_metadata(self.pipe)

    @torch.no_grad()
    def encode_prompt(self, text: str) -> Prompt:
        """Encode a prompt as the pipeline does. Longer texts are encoded in chunks (see `long_prompts`)."""
        return self.family.encode_text(self.pipe, text, self.device)

    def alike(self, prompts: Mapping[str, Prompt]) -> dict[str, Prompt]:
        """Pad prompts to the same length, so that they can share a batch: with empty chunks, or with zeros if the prompt is
        all zeros. The text encoders must still be loaded. Prompts of a network that takes different lengths are returned
        as they are."""
        most = max(len(prompt.embeds) for prompt in prompts.values())
        if self.family.network.ragged or all(len(prompt.embeds) == most for prompt in prompts.values()):
            return dict(prompts)
        empty = self.encode_prompt("").embeds
        out = {}
        for role, prompt in prompts.items():
            tail = empty if bool(prompt.embeds.any()) else torch.zeros_like(empty)
            more = (most - len(prompt.embeds)) // len(empty)
            out[role] = replace(prompt, embeds=torch.cat([prompt.embeds, *[tail] * more]))
        return out

    def encode_negative(self, text: str = "") -> Prompt:
        """Encode the prompt that classifier-free guidance moves away from. Without a text, it is zeros if the base was
        trained that way (SDXL)."""
        prompt = self.encode_prompt(text)
        if text or not self.pipe.config.get("force_zeros_for_empty_prompt"):
            return prompt
        return Prompt(
            torch.zeros_like(prompt.embeds), None if prompt.pooled is None else torch.zeros_like(prompt.pooled)
        )

    @torch.no_grad()
    def encode_picture(self, pixels: Float[Tensor, "3 h w"], sizes: Sequence[int]) -> Picture:
        """Encode a picture with values in -1..1; `sizes`: SDXL's six size numbers. The VAE runs in full precision, because
        some VAEs overflow in fp16. Raises UsageError if the latent is not finite."""
        vae = self.vae.to(self.device, torch.float32)  # type: ignore[call-arg]
        posterior = vae.encode(pixels[None].to(self.device)).latent_dist  # type: ignore[union-attr]
        shift = vae.config.get("shift_factor") or 0.0
        scale = vae.config["scaling_factor"]
        mean, std = (posterior.mean[0] - shift) * scale, posterior.std[0] * scale
        if not bool(torch.isfinite(mean).all()):
            raise UsageError("the VAE gave NaN latents", self.name, "Use another VAE (for SDXL: an fp16-safe one).")
        return Picture(mean, std, torch.tensor(sizes, dtype=torch.float32, device=self.device))

    def release(self, tiles: bool = False) -> None:
        """Free memory for training, once all prompts and pictures are encoded: drop the text encoders and move the VAE to
        the CPU. `sample.generate` moves it back while it draws. With `tiles`, it decodes in tiles from now on."""
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if part in self.pipe.components:
                setattr(self.pipe, part, None)
        self.vae.to("cpu")  # type: ignore[arg-type]
        if tiles:
            self.vae.enable_tiling()
            self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = TILE, TILE // self.pipe.vae_scale_factor
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def new_graphs(self) -> Graphs | None:
        """An empty store of captured passes; None if the device has no CUDA graphs or they are switched off."""
        return Graphs(CudaExecutor(self.device)) if self.graphs and self.device.type == "cuda" else None

    def short_of_memory(self) -> bool:
        """Whether there may be too little memory to draw beside captured steps, which keep their activations."""
        return self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0] < DRAWING

    def conditions(self, prompts: Sequence[Prompt], sizes: Tensor) -> dict[str, Any]:
        """The arguments of the denoiser, or of a ControlNet, other than latents and timesteps. `prompts` and `sizes
        [b, 6]`: one per row."""
        dtype = self.dtype
        more = self.family.conditions(prompts, sizes, dtype)
        if not self.family.network.layers.own_prompt:
            texts, segments = rows(prompts, dtype)
            return {"encoder_hidden_states": texts, **segments, **more}
        return {"encoder_hidden_states": self._texts(prompts, dtype), **more}

    def _texts(self, prompts: Sequence[Prompt], dtype: torch.dtype) -> Tensor:
        """The embeddings of a batch, `[b, tokens, channels]`. The same prompts give the same tensor object, by which
        adapted layers recognise the prompts whose keys and values they have cached."""
        key = (dtype, *prompts)
        if key not in self.embeddings:
            if len(self.embeddings) == MOST_BATCHES:
                self.embeddings.clear()
            self.embeddings[key] = torch.stack([prompt.embeds for prompt in prompts]).to(dtype)
        return self.embeddings[key]

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[Prompt], sizes: Tensor, **residuals: Any) -> Tensor:
        """The denoiser's prediction for a batch, in the shape of `noisy [b, c, h, w]`. `residuals`: outputs of a ControlNet,
        under the names of the denoiser's arguments."""
        conditions = {**self.conditions(prompts, sizes), **residuals}
        return self.family.network.predict(self.denoiser, noisy.to(self.dtype), t, self.guidance, conditions)


class RunData:
    """A base with the pictures and prompts of one run, by role. It is the trainer's `Denoiser`."""

    def __init__(self, base: Base, pictures: Mapping[str, Sequence[Picture]], prompts: Mapping[str, Prompt]) -> None:
        self.base, self.pictures, self.encoded = base, pictures, prompts
        self.prompts: Mapping[str, Tensor] = {role: prompt.embeds for role, prompt in prompts.items()}
        self.graphs = base.new_graphs()

    def constants(self) -> list[Tensor]:
        return list(self.base.embeddings.values())

    def draw(
        self, images: Sequence[str], shared: frozenset[Shared], rng: torch.Generator, noises: Sequence[Noise] = ()
    ) -> list[Sample]:
        """One sample per branch: x_t, t and the target. Random numbers are drawn on the CPU, so that a seed gives the same
        samples on every device. `noises`: how each is drawn; by default all in the usual way."""
        some = [self.pictures[role] for role in images]
        return drawn(self.base.process, some, noises or [Noise()] * len(images), shared, rng)

    def predict(self, samples: Sequence[Sample], prompts: Sequence[str]) -> Tensor:
        noisy = torch.cat([sample.noisy for sample in samples])
        t = torch.cat([sample.t for sample in samples])
        sizes = torch.cat([sample.sizes for sample in samples])
        encoded = [self.encoded[sample.prompt or role] for sample, role in zip(samples, prompts, strict=True)]
        return self.base.predict(noisy, t, encoded, sizes)

    def x0_factor(self, t: Tensor) -> Tensor:
        return self.base.process.x0_factor(t)


def joined(models: Mapping[str, Denoiser]) -> RunData:
    """Combine the RunData of several jobs on one base, with prompts named KEY/ROLE. The result can predict, but has no
    pictures to draw samples from."""
    found = {key: model for key, model in models.items() if isinstance(model, RunData)}
    prompts = {f"{key}/{role}": prompt for key, one in found.items() for role, prompt in one.encoded.items()}
    return RunData(next(iter(found.values())).base, {}, prompts)


def load(name: str = "icons", device: str | None = None, loading: Loading = AS_IT_IS) -> Base:
    """Load a base: `icons` (embedded), a diffusers folder, a hub id, or a single-file checkpoint. Weights are fp32 on CPU
    and MPS and bf16 on CUDA, unless `loading` says otherwise. Raises UsageError if it cannot be loaded."""
    where = found_device(device or loading.device)
    if where.type == "cuda":
        torch.cuda.set_device(where)  # CUDA graphs are captured on the current card
    dtype = torch.bfloat16 if where.type == "cuda" or loading.preset.half else torch.float32
    with interrupts_kept():
        pipe = open_pipeline(name, dtype, loading.vae, loading.prediction, loading.parts)
    network = family_of(pipe).network
    denoiser = getattr(pipe, network.part)
    save_memory(denoiser, where, loading.preset)
    if loading.compile:
        compile_blocks(denoiser, network.blocks)
    moved(pipe, network, where, loading.swap)
    return Base(name, pipe, where, loading.graphs and not loading.swap, loading.timesteps)
