"""What a family of base models is."""

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

    title: str  # for people
    part: str  # its name in a pipeline and in a diffusers folder; in LoRA files, the first word of its modules' names
    residuals: tuple[str, ...]  # the arguments by which a ControlNet's outputs are added
    control_keys: tuple[str, ...]  # what a ControlNet's configuration must have in common with it
    units: tuple[type[nn.Module], ...]  # what gradient checkpointing computes again, one at a time

    def size(self, config: Mapping[str, Any]) -> int:
        """The side of the square latents that it was trained on."""
        ...

    def factor(self, config: Mapping[str, Any]) -> int:
        """The sides of its latents are multiples of this."""
        ...

    def check(self, pipe: Any, name: str) -> None:
        """UsageError for a pipeline that is no text-to-image model, such as one for inpainting."""
        ...

    def folder_config(self, folder: str) -> dict[str, Any]:
        """Its configuration in a diffusers folder or hub repository. OSError or ValueError where there is none."""
        ...

    def empty(self, config: Mapping[str, Any]) -> Any:
        """One without weights, on the current device."""
        ...

    def example(self, config: Mapping[str, Any], rows: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        """Its arguments for a batch of so many rows, as empty tensors on the meta device."""
        ...

    def picture_sizes(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """SDXL's six size numbers, `[rows, 6]`, among the arguments with which a pipeline calls it."""
        ...


@dataclass(frozen=True)
class Family:
    """A family of base models."""

    name: FileFamily  # as LoRA files have it
    pipeline: type[Any]  # of diffusers
    matches: Callable[[Mapping[str, Any]], bool]  # the denoiser's configuration
    network: Network
    # Role → prefixes of the attention groups that hold it, after B-LoRA (arXiv 2403.14572) and UnZipLoRA (arXiv 2412.04465): there
    # that role's adapter uses every channel, and the other one only its selected ones
    blocks: Mapping[str, tuple[str, ...]]
    encode_text: Callable[[Any, str, torch.device], Prompt]  # pipeline, text, device
    conditions: Callable[
        [Sequence[Prompt], Tensor, torch.dtype], dict[str, Any]
    ]  # what the denoiser reads beside the text
    lora_metadata: Callable[[Any], dict[str, str]]  # pipeline → what tells its LoRAs from others of the same family
    process: Callable[[Any, str], Diffusion] = Diffusion  # the scheduler's configuration, the base's name
