"""What a memory preset does to a base, a recipe and a saved state; and what to do when it was not enough."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unbraid.bases.presets import Preset, advice
from unbraid.common.errors import UsageError
from unbraid.core.fp8 import store_in_fp8
from unbraid.core.optim import adamw
from unbraid.core.optim8 import adamw8
from unbraid.core.recipe import Recipe

MOMENTS = {True: "mean", False: "exp_avg"}  # what AdamW8 and AdamW call their first moment


def notes(device: torch.device, preset: Preset) -> list[str]:
    """What of a preset a device does not do, or does at a price."""
    told = []
    if preset.half and device.type == "cpu":
        told.append(f"--vram {preset.name} on a processor: half precision takes less memory there, and more time")
    if preset.fp8 and device.type == "mps":
        told.append(
            f"--vram {preset.name} on mps: there is no fp8, weights stay in half precision and take twice the memory"
        )
    return told


def save_memory(denoiser: Any, device: torch.device, preset: Preset) -> None:
    """Gradient checkpointing, and the denoiser's weights in fp8: before it goes to its device, where it might not fit otherwise, and
    before adapters are attached, which stay fp32."""
    if preset.checkpointing:  # nothing random is computed again; and random states cannot be asked for in a CUDA graph
        denoiser.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    if preset.fp8 and device.type != "mps":
        store_in_fp8(denoiser)


def with_8bit_optimizer(recipe: Recipe, preset: Preset) -> Recipe:
    """The recipe with 8-bit moments, where the preset wants them and its optimiser is AdamW."""
    if not preset.adam8 or recipe.optimization.optimizer is not adamw:
        return recipe
    return replace(recipe, optimization=replace(recipe.optimization, optimizer=adamw8))


def drop_foreign_moments(saved: Mapping[str, Tensor], preset: Preset) -> tuple[dict[str, Tensor], list[str]]:
    """A saved state for another preset: moments of the other AdamW are left out, and start anew."""
    other = f"/{MOMENTS[not preset.adam8]}"
    if not any(key.startswith("optimizer/") and key.endswith(other) for key in saved):
        return dict(saved), []
    kept = {key: value for key, value in saved.items() if not key.startswith("optimizer/")}
    return kept, ["the run goes on with another kind of AdamW: its moments start anew"]


def memory_error(preset: Preset, begun: bool) -> UsageError:
    """For the user, in the place of torch's out-of-memory error. `begun`: the run's folder is there."""
    more = " Add --resume to go on with this run." if begun else ""
    return UsageError("the device's memory is full", f"--vram {preset.name}", advice(preset) + more)
