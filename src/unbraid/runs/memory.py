"""An estimate of the memory that a training run takes on its device, from the base's configuration alone.

No weights are loaded, and nothing is computed: one step runs on torch's meta device, where tensors have shapes but no
values, and the sizes of all tensors that autograd would keep are added up.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unbraid.bases.configuration import denoiser_config
from unbraid.bases.devices import pick_device
from unbraid.bases.families.family import Network
from unbraid.bases.pipeline import quiet
from unbraid.bases.presets import OPTIMIZERS, Preset
from unbraid.bases.savings import save_memory, swapped_blocks, swaps_on
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Branch
from unbraid.core.optim import groups
from unbraid.core.recipe import Recipe
from unbraid.core.swap import BUFFERS, frozen_bytes
from unbraid.files.lora_file import read
from unbraid.methods import METHODS
from unbraid.runs.job import Job
from unbraid.sampling.attach import attach_to

GIB = 2**30
STREAMS = ("hidden_states", "encoder_hidden_states")  # the inputs of a unit that is called with names


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device at the peak of a training step, without those of the driver and of fragmentation."""

    weights: int  # of the denoiser; text encoders and VAE are off the device by then
    adapters: int  # with their gradients and the optimizer's moments
    activations: int  # kept for the backward pass

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.activations


def memory_line(job: Job) -> str:
    """The estimate as one line of text, with advice if the rank is high for the memory preset."""
    preset = job.loading.preset
    found = estimate(job)
    unit, name = (GIB, "GiB") if found.total > GIB else (2**20, "MiB")
    parts = {"weights": found.weights, "adapters": found.adapters, "activations": found.activations}
    shares = ", ".join(f"{part} {size / unit:.1f}" for part, size in parts.items())
    text = f"memory, estimated: {found.total / unit:.1f} {name} ({shares}) with --vram {preset.name}"
    text += f" --swap {job.loading.swap}" if job.loading.swap else ""
    rank = job.settings.get("rank")
    if isinstance(rank, int) and rank > preset.rank:
        text += f"; at this preset, ranks up to {preset.rank} are advised: --set rank={preset.rank}"
    return text


def estimate(job: Job, device: str | None = None) -> Estimate:
    """Estimate a run's memory on `device` (cuda, mps, cpu; None: the device that the run would use).

    UsageError if the base's configuration cannot be read."""
    preset = job.loading.preset
    where = torch.device(device or job.loading.device or pick_device())  # this machine need not have the device
    dtype = torch.bfloat16 if preset.half or where.type == "cuda" else torch.float32
    family, config = denoiser_config(job.base)
    make = partial(_typed, family.network, config, dtype)
    with quiet():
        resting = make()
        save_memory(resting, torch.device("cpu"), preset)
    weights = sum(one.numel() * one.element_size() for one in (*resting.parameters(), *resting.buffers()))
    away = [frozen_bytes(one) for one in swapped_blocks(resting, family.network, job.loading.swap)]
    if away and swaps_on(where):
        weights -= sum(away) - min(BUFFERS, len(away)) * max(away)
    (recipe,) = METHODS[job.method].make(job.data.training.blocks or family.blocks, **job.settings)
    denoiser, adapters = _adapted(job, recipe, family.network, make)
    trained = sum(p.numel() for group in groups(adapters, recipe.rates) for p in group["params"]) if recipe.steps else 0
    kept = sum(p.numel() for name in adapters.names for one in adapters.of(name).values() for _, p in one.parts())
    moments = OPTIMIZERS[preset.optimizer].bytes
    return Estimate(
        weights,
        round(4 * kept + (4 + moments) * trained),
        _activations(denoiser, family.network, adapters, recipe, preset),
    )


def _adapted(job: Job, recipe: Recipe, network: Network, make: Callable[[], Any]) -> tuple[Any, Adapters]:
    """A denoiser with the adapters of a run, on the meta device.

    Some methods read values when they prepare adapters, and fail there: on the meta device there are none. Then as many
    plain adapters of the run's rank are attached instead."""
    files = {role: (path, read(path).modules) for role, path in job.data.loras.items()}
    with quiet(), torch.device("meta"):
        denoiser, rng = make(), torch.Generator("cpu")
        adapters = attach_to(denoiser, network, files, job.base) or Adapters.attach(
            denoiser, recipe.targets, network.layers
        )
        try:
            if recipe.steps:  # with no steps, preparing makes the result, and nothing is trained
                recipe.prepare(adapters, rng)
        except RuntimeError:  # raised by torch for reading values on the meta device
            denoiser = make()
            adapters = Adapters.attach(denoiser, recipe.targets, network.layers)
            active = {one.adapter for branch in recipe.branches(0) for one in branch.active}
            for name in sorted(active | {name for name, _ in recipe.rates}):
                adapters.new(name, job.settings.get("rank", 64), rng)
    return denoiser, adapters


def _typed(network: Network, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    return network.empty(config).requires_grad_(False).to(dtype)


def _activations(denoiser: Any, network: Network, adapters: Adapters, recipe: Recipe, preset: Preset) -> int:
    """Bytes kept for the backward pass of one forward pass, at the last step, when all branches take part.

    The pass holds as many branches as the preset puts into one pass."""
    size = recipe.passes.batch_size if recipe.passes.in_turn else preset.at_once
    branches = recipe.examples(max(recipe.steps - 1, 0))[: min(size, preset.at_once)]
    if not recipe.steps or not branches:
        return 0
    ledger = _Ledger({id(one.untyped_storage()) for one in (*denoiser.parameters(), *denoiser.buffers())})
    with ledger.keeping(denoiser, network.units), _Fused():
        _forward(denoiser, network, adapters, branches)
    if not preset.checkpointing:
        return ledger.outside + sum(ledger.inside)
    return ledger.outside + sum(ledger.inputs) + max(ledger.inside, default=0)


def _forward(denoiser: Any, network: Network, adapters: Adapters, branches: tuple[Branch, ...]) -> Tensor:
    noisy, conditions = network.example(denoiser.config, len(branches), denoiser.dtype)
    t = torch.empty(len(branches), device="meta")
    prompts = {active.prompt for branch in branches for active in branch.active if active.prompt}
    segments = {active.segment[1] for branch in branches for active in branch.active if active.segment}
    texts = {role: torch.empty_like(conditions["encoder_hidden_states"][0]) for role in prompts}
    for count in segments:
        conditions["encoder_hidden_states"] = conditions["encoder_hidden_states"].repeat(1, count, 1)
        conditions["segments"] = count
    with adapters.activate([branch.active for branch in branches], texts):
        return network.predict(denoiser, noisy, t, 1.0, conditions)


class _Ledger:
    """Counts the bytes that autograd keeps.

    `inside`: per unit of gradient checkpointing; `outside`: outside the units; `inputs`: the input of each unit."""

    def __init__(self, ignored: set[int]) -> None:
        self.seen, self.outside, self.inside, self.inputs = ignored, 0, [], []
        self.alive: list[Any] = []  # keeps the storages alive, so that Python reuses none of their ids
        self.within = False

    def keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if id(storage) not in self.seen:
            self.seen.add(id(storage))
            self.alive.append(storage)
            if self.within:
                self.inside[-1] += storage.nbytes()
            else:
                self.outside += storage.nbytes()
        return x

    def enter(self, module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        streams = args[:1] or [given[name] for name in STREAMS if name in given]
        self.inputs.append(sum(one.numel() * one.element_size() for one in streams))
        self.inside.append(0)
        self.within = True

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.within = False

    @contextmanager
    def keeping(self, denoiser: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[None]:
        units = [module for module in denoiser.modules() if isinstance(module, kinds)]
        hooks = [unit.register_forward_pre_hook(self.enter, with_kwargs=True) for unit in units]
        hooks += [unit.register_forward_hook(self.leave) for unit in units]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x):
                yield
        finally:
            for hook in hooks:
                hook.remove()


class _FusedAttention(torch.autograd.Function):
    """A stand-in for fused attention that keeps the same tensors: its inputs and output, not the attention matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("nothing is computed here")


class _Fused(TorchFunctionMode):
    """Use `_FusedAttention` on the meta device, where torch would compute attention step by step and keep more."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return _FusedAttention.apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))
