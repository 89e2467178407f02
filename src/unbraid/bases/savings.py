"""Applying a memory preset to a base, a recipe and a saved state; the error for when it was not enough."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unbraid.bases.families.family import Network
from unbraid.bases.presets import OPTIMIZERS, Loading, Preset, advice
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.fp8 import store_in_fp8
from unbraid.core.optim import Rates, adamw, groups
from unbraid.core.optim8 import adamw8
from unbraid.core.recipe import Recipe
from unbraid.core.swap import Swap, evenly


def adafactor(adapters: Adapters, rates: Rates) -> torch.optim.Optimizer:
    """Adafactor (arXiv 1804.04235) with AdamW's learning rates: without its relative steps, which hardly move a factor that
    begins at zero."""
    from transformers.optimization import Adafactor

    return Adafactor(groups(adapters, rates), lr=0.0, scale_parameter=False, relative_step=False)


MAKERS: Mapping[str, Callable[[Adapters, Rates], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8,
    "adafactor": adafactor,
}


def notes(device: torch.device, loading: Loading) -> list[str]:
    """Remarks on what a preset or an option does not do on a device, or does at a price."""
    remarks, preset = list[str](), loading.preset
    if loading.swap and not swaps_on(device):
        remarks.append(
            f"--swap on {device.type} has no other memory to swap to: it only switches gradient checkpointing on"
        )
    elif loading.swap and loading.graphs and device.type == "cuda":
        remarks.append("--swap: no CUDA graphs, because weights are copied in the middle of a step")
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


def swaps_on(device: torch.device) -> bool:
    """Whether a device has memory of its own, so that blocks can be swapped."""
    return device.type not in ("cpu", "mps", "meta")


def swapped_blocks(denoiser: Any, network: Network, count: int) -> list[nn.Module]:
    """The blocks of a denoiser that are swapped if `count` of them are: at equal distances. UsageError if there are not so
    many."""
    every = [one for one in denoiser.modules() if isinstance(one, network.blocks)]
    if not 0 <= count <= len(every):
        fix = f"Its {network.title} has {len(every)} blocks: give 0 to {len(every)}."
        raise UsageError(f"{count} blocks cannot be swapped", "--swap", fix)
    return [every[i] for i in evenly(count, len(every))]


def moved(pipe: Any, network: Network, device: torch.device, count: int) -> None:
    """Move a pipeline to a device, but for the weights of `count` blocks of its denoiser, which are swapped. UsageError if
    there are not so many blocks."""
    some = swapped_blocks(getattr(pipe, network.part), network, count)
    if not some or not swaps_on(device):
        pipe.to(device)
        return
    with Swap(some, device).put_aside():
        pipe.to(device)


def with_optimizer(recipe: Recipe, preset: Preset) -> Recipe:
    """The recipe with the preset's optimiser, if its own is AdamW."""
    if recipe.optimization.optimizer is not adamw:
        return recipe
    return replace(recipe, optimization=replace(recipe.optimization, optimizer=MAKERS[preset.optimizer]))


def drop_foreign_moments(saved: Mapping[str, Tensor], preset: Preset) -> tuple[dict[str, Tensor], list[str]]:
    """Prepare a saved state for a run with this preset: moments of another optimiser are left out, so they start anew.
    Returns the state and warnings."""
    found = {key.rsplit("/", 1)[1] for key in saved if key.startswith("optimizer/")}
    others = {one.mark for name, one in OPTIMIZERS.items() if name != preset.optimizer}
    if not found & others:
        return dict(saved), []
    kept = {key: value for key, value in saved.items() if not key.startswith("optimizer/")}
    return kept, ["the run goes on with another optimiser: its moments start anew"]


def memory_error(preset: Preset, begun: bool) -> UsageError:
    """The error to show in place of torch's out-of-memory error. `begun`: whether the run's folder exists already."""
    more = " Add --resume to go on with this run." if begun else ""
    return UsageError("the device's memory is full", f"--vram {preset.name}", advice(preset) + more)
