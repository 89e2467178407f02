"""The record that describes a family of base models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbraid.bases.families.noising import Process
from unbraid.core.layers import Layers
from unbraid.core.selectors import Blocks
from unbraid.files.formats.blocks import Family as FileFamily


@dataclass(frozen=True, eq=False)
class Prompt:
    """An encoded text: `embeds [tokens, channels]`, and SDXL's pooled vector `[channels]`. Compared by identity: two prompts are
    equal only if they are the same object. `segments`: how many texts of equal length it consists of, one after the other,
    that do not read each other (`unbraid.bases.families.segments`)."""

    embeds: Tensor
    pooled: Tensor | None
    segments: int = 1


@runtime_checkable
class Network(Protocol):
    """A kind of denoiser, such as the UNet of Stable Diffusion.

    Everywhere but in the methods below, latents and predictions are `[b, c, h, w]`, timesteps are those of the scheduler,
    and a prediction is what the scheduler's step takes. The methods convert from and to what the denoiser and its
    pipelines want."""

    title: str  # shown to users
    part: str  # its name in a pipeline and in a diffusers folder; in LoRA files, the first word of its modules' names
    texts: tuple[str, ...]  # the names of the text encoders that its pipelines must have
    layers: Layers  # which of its layers carry adapters
    residuals: tuple[str, ...]  # its arguments that take a ControlNet's outputs
    control_keys: tuple[str, ...]  # entries that a ControlNet's configuration must share with its own; empty: none fits
    units: tuple[type[nn.Module], ...]  # modules that gradient checkpointing recomputes, one at a time
    blocks: tuple[type[nn.Module], ...]  # modules that torch.compile compiles, one at a time
    patch: int  # the side of the patches into which it divides a latent; 1: none
    ragged: bool  # whether prompts of different lengths may share a batch

    def side(self, pipe: Any) -> int:
        """The side of the square pictures that it was trained on, in pixels."""
        ...

    def channels(self, config: Mapping[str, Any]) -> int:
        """The number of channels of its latents."""
        ...

    def factor(self, config: Mapping[str, Any]) -> int:
        """The sides of its latents must be multiples of this."""
        ...

    def check(self, pipe: Any, name: str) -> None:
        """Raise UsageError if the pipeline is no text-to-image model, such as one for inpainting."""
        ...

    def check_options(self, prediction: str, timesteps: str) -> None:
        """Raise UsageError for `--prediction` and `--timesteps` that it cannot have. Empty: none is given."""
        ...

    def process(self, config: Any, base: str, timesteps: str) -> Process:
        """Its noise. `config`: the scheduler's configuration. `base`: the base's name, for errors. `timesteps`: how they
        are drawn in training; empty: as published. Raises UsageError if it cannot be so."""
        ...

    def folder_config(self, folder: str) -> dict[str, Any]:
        """Its configuration in a diffusers folder or hub repository. Raises OSError or ValueError if there is none."""
        ...

    def empty(self, config: Mapping[str, Any]) -> Any:
        """A denoiser without weights, on the meta device."""
        ...

    def example(self, config: Mapping[str, Any], rows: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
        """Latents and conditions for a batch of `rows` rows of the usual size, as tensors on the meta device."""
        ...

    def predict(
        self, denoiser: Any, noisy: Tensor, t: Tensor, guidance: float, conditions: Mapping[str, Any]
    ) -> Tensor:
        """The denoiser's prediction for latents, which have the type that it computes in, at timesteps `t [b]`.
        `guidance`: for those that take it as an input. `conditions`: its arguments other than these.
        `encoder_hidden_states` is a tensor, or a list with a tensor `[tokens, channels]` per row."""
        ...

    def picture_sizes(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """SDXL's six size numbers, `[rows, 6]`, from the arguments with which a pipeline calls it; None without them."""
        ...

    def schedule(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        """Set a scheduler's timesteps as the pipelines do. `size`: height and width of the latents."""
        ...

    def prompt_arguments(self, prompt: Prompt, count: int) -> dict[str, Any]:
        """The arguments of a pipeline's call for `count` pictures of a prompt, without classifier-free guidance."""
        ...

    def stock_arguments(self, pipe: Any, guidance: float) -> dict[str, Any]:
        """The arguments of a stock pipeline's call with a prompt, for classifier-free guidance with this scale."""
        ...

    def received(self, args: Sequence[Any], given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Latents and timestep from the arguments with which a pipeline calls the denoiser. The timestep has one element
        or one per row, all equal."""
        ...

    def returned(self, prediction: Tensor) -> tuple[Any]:
        """A prediction in the form in which pipelines get it from the denoiser."""
        ...

    def packed(self, latents: Tensor) -> Tensor:
        """Latents in the form in which pipelines take them as an argument."""
        ...

    def stand_in(self, denoiser: Any, masked: bool) -> dict[str, Any]:
        """Attributes that pipelines read from a denoiser. `masked`: whether a mask says what is drawn anew."""
        ...

    def remarks(self, pipe: Any, texts: Sequence[str]) -> list[str]:
        """A remark for each text that is longer than what is encoded at once."""
        ...


@dataclass(frozen=True)
class Preset:
    """What a family changes in a method: its default settings, and how timesteps are drawn (see `Network.process`)."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    timesteps: str = ""


@dataclass(frozen=True)
class Family:
    """A family of base models."""

    name: FileFamily  # its name in LoRA files
    pipeline: type[Any]  # its pipeline class in diffusers
    matches: Callable[[Mapping[str, Any]], bool]  # the denoiser's configuration → whether it is of this family
    network: Network
    # Role → selectors of the attention groups that control it, after UnZipLoRA (arXiv 2412.04465): in them that role's
    # adapter uses every channel, and the other role's only its selected ones. `ROLE alone`: B-LoRA's (arXiv 2403.14572).
    # `coarse`: the layers of low resolution, for which DuoLoRA (arXiv 2504.13206) expects content.
    blocks: Blocks
    encode_text: Callable[[Any, str, torch.device], Prompt]  # pipeline, text, device
    # prompts, sizes [b, 6], dtype → the denoiser's arguments other than latents, timesteps and text
    conditions: Callable[[Sequence[Prompt], Tensor, torch.dtype], dict[str, Any]]
    lora_metadata: Callable[[Any], dict[str, str]]  # pipeline → metadata for LoRAs of this base beyond the family
    presets: Mapping[str, Preset] = field(default_factory=dict)  # method → what is different on this family
