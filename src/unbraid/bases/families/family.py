"""The record that describes a family of base models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbraid.bases.families.noising import Diffusion
from unbraid.files.formats.blocks import Family as FileFamily


@dataclass(frozen=True, eq=False)
class Prompt:
    """An encoded text: `embeds [tokens, channels]`, and SDXL's pooled vector `[channels]`. Compared by identity: two prompts are
    equal only if they are the same object."""

    embeds: Tensor
    pooled: Tensor | None


@runtime_checkable
class Network(Protocol):
    """A kind of denoiser, such as the UNet of Stable Diffusion."""

    title: str  # shown to users
    part: str  # its name in a pipeline and in a diffusers folder; in LoRA files, the first word of its modules' names
    residuals: tuple[str, ...]  # its arguments that take a ControlNet's outputs
    control_keys: tuple[str, ...]  # entries that a ControlNet's configuration must share with its own
    units: tuple[type[nn.Module], ...]  # modules that gradient checkpointing recomputes, one at a time

    def size(self, config: Mapping[str, Any]) -> int:
        """The side of the square latents that it was trained on, in latent positions."""
        ...

    def factor(self, config: Mapping[str, Any]) -> int:
        """The sides of its latents must be multiples of this."""
        ...

    def check(self, pipe: Any, name: str) -> None:
        """Raise UsageError if the pipeline is no text-to-image model, such as one for inpainting."""
        ...

    def folder_config(self, folder: str) -> dict[str, Any]:
        """Its configuration in a diffusers folder or hub repository. Raises OSError or ValueError if there is none."""
        ...

    def empty(self, config: Mapping[str, Any]) -> Any:
        """A denoiser without weights, on the meta device."""
        ...

    def example(self, config: Mapping[str, Any], rows: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """Its arguments for a batch of `rows` rows with prompts of `tokens` tokens, as tensors on the meta device."""
        ...

    def picture_sizes(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """SDXL's six size numbers, `[rows, 6]`, from the arguments with which a pipeline calls it; None without them."""
        ...


@dataclass(frozen=True)
class Family:
    """A family of base models."""

    name: FileFamily  # its name in LoRA files
    pipeline: type[Any]  # its pipeline class in diffusers
    matches: Callable[[Mapping[str, Any]], bool]  # the denoiser's configuration → whether it is of this family
    network: Network
    # Role → prefixes of the attention groups that control it, after B-LoRA (arXiv 2403.14572) and UnZipLoRA (arXiv
    # 2412.04465). In them that role's adapter uses every channel, and the other role's only its selected ones.
    blocks: Mapping[str, tuple[str, ...]]
    encode_text: Callable[[Any, str, torch.device], Prompt]  # pipeline, text, device
    # prompts, sizes [b, 6], dtype → the denoiser's arguments other than latents, timesteps and text
    conditions: Callable[[Sequence[Prompt], Tensor, torch.dtype], dict[str, Any]]
    lora_metadata: Callable[[Any], dict[str, str]]  # pipeline → metadata for LoRAs of this base beyond the family
    process: Callable[[Any, str], Diffusion] = Diffusion  # the scheduler's configuration, the base's name → its noise
