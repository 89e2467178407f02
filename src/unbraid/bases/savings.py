"""Applying a memory preset to a base, a recipe and a saved state; the error for when it was not enough."""

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

MOMENTS = {True: "mean", False: "exp_avg"}  # the names of the first moment in AdamW8 (True) and AdamW (False)


def notes(device: torch.device, preset: Preset) -> list[str]:
    """Remarks on what a preset does not do on a device, or does at a price."""
    remarks = []
    if preset.half and device.type == "cpu":
        remarks.append(f"--vram {preset.name} on a processor: half precision takes less memory there, and more time")
    if preset.fp8 and device.type == "mps":
        remarks.append(
            f"--vram {preset.name} on mps: there is no fp8, weights stay in half precision and take twice the memory"
        )
    return remarks


def save_memory(denoiser: Any, device: torch.device, preset: Preset) -> None:
    """Switch on gradient checkpointing and convert the denoiser's weights to fp8, as the preset says. Call it before the
    denoiser is moved to its device, where it might not fit yet, and before adapters are attached, which stay fp32."""
    # nothing random is recomputed, so the random state need not be saved; in a CUDA graph it cannot be read
    if preset.checkpointing:
        denoiser.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    if preset.fp8 and device.type != "mps":
        store_in_fp8(denoiser)


def with_8bit_optimizer(recipe: Recipe, preset: Preset) -> Recipe:
    """The recipe with 8-bit AdamW, if the preset uses it and the recipe's optimiser is AdamW."""
    if not preset.adam8 or recipe.optimization.optimizer is not adamw:
        return recipe
    return replace(recipe, optimization=replace(recipe.optimization, optimizer=adamw8))


def drop_foreign_moments(saved: Mapping[str, Tensor], preset: Preset) -> tuple[dict[str, Tensor], list[str]]:
    """Prepare a saved state for a run with this preset: moments of the other kind of AdamW are left out, so they start
    anew. Returns the state and warnings."""
    other = f"/{MOMENTS[not preset.adam8]}"
    if not any(key.startswith("optimizer/") and key.endswith(other) for key in saved):
        return dict(saved), []
    kept = {key: value for key, value in saved.items() if not key.startswith("optimizer/")}
    return kept, ["the run goes on with another kind of AdamW: its moments start anew"]


def memory_error(preset: Preset, begun: bool) -> UsageError:
    """The error to show in place of torch's out-of-memory error. `begun`: whether the run's folder exists already."""
    more = " Add --resume to go on with this run." if begun else ""
    return UsageError("the device's memory is full", f"--vram {preset.name}", advice(preset) + more)
