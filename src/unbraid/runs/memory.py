"""How much memory a training run takes on its device, from the base's configuration alone: nothing is loaded, nothing computed.

A step is gone through on torch's meta device, which has shapes and no values, and what autograd would keep is added up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unbraid.bases.base import BLOCKS, pick_device
from unbraid.bases.pipeline import location, quiet
from unbraid.bases.presets import Preset
from unbraid.bases.savings import save_memory
from unbraid.bases.single_file import configs, empty_unet
from unbraid.bases.sniff import sniff
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Branch
from unbraid.core.optim import groups
from unbraid.core.recipe import Recipe
from unbraid.files.lora_file import read
from unbraid.methods import METHODS
from unbraid.runs.job import Job
from unbraid.sampling.render import attach_to

GIB = 2**30
TOKENS = 77
UNITS = (ResnetBlock2D, BasicTransformerBlock)  # what gradient checkpointing computes again, one at a time


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device at the height of a training step. Not in it: what the driver itself takes, and fragmentation."""

    weights: int  # of the UNet; text encoders and VAE are gone by then
    adapters: int  # with their gradients and moments
    activations: int  # kept for the backward pass

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.activations


def memory_line(job: Job) -> str:
    """What a run is going to take, for people; and the preset's advice on its rank."""
    preset = job.loading.preset
    found = estimate(job)
    unit, name = (GIB, "GiB") if found.total > GIB else (2**20, "MiB")
    parts = {"weights": found.weights, "adapters": found.adapters, "activations": found.activations}
    shares = ", ".join(f"{part} {size / unit:.1f}" for part, size in parts.items())
    text = f"memory, estimated: {found.total / unit:.1f} {name} ({shares}) with --vram {preset.name}"
    rank = job.settings.get("rank")
    if isinstance(rank, int) and rank > preset.rank:
        text += f"; at this preset, ranks up to {preset.rank} are advised: --set rank={preset.rank}"
    return text


def estimate(job: Job, device: str | None = None) -> Estimate:
    """On `device` (cuda, mps, cpu; none: the one that the run would take). UsageError for a base whose configuration cannot be read."""
    preset = job.loading.preset
    where = torch.device(device or job.loading.device or pick_device())  # it need not be there
    dtype = torch.bfloat16 if preset.half or where.type == "cuda" else torch.float32
    config = unet_config(job.base)
    with quiet():
        resting = _typed(config, dtype)
        save_memory(resting, torch.device("cpu"), preset)
    weights = sum(one.numel() * one.element_size() for one in (*resting.parameters(), *resting.buffers()))
    blocks = BLOCKS["sdxl" if config.get("addition_embed_type") else "sd15"]
    (recipe,) = METHODS[job.method].make(blocks, **job.settings)
    unet, adapters = _adapted(job, recipe, lambda: _typed(config, dtype))
    trained = sum(p.numel() for group in groups(adapters, recipe.rates) for p in group["params"]) if recipe.steps else 0
    kept = sum(p.numel() for name in adapters.names for one in adapters.of(name).values() for _, p in one.parts())
    moments = 2.03 if preset.adam8 else 8
    return Estimate(weights, round(4 * kept + (4 + moments) * trained), _activations(unet, adapters, recipe, preset))


def unet_config(base: str) -> dict[str, Any]:
    """A UNet's configuration: of a folder, a hub id (which downloads it), or made from a checkpoint's header."""
    path = location(base)
    if Path(path).is_file():
        return configs(sniff(Path(path)))["unet/config.json"]
    try:
        found: Any = UNet2DConditionModel.load_config(path, subfolder="unet")
    except (OSError, ValueError) as error:
        fix = "Give icons, a complete diffusers folder, a checkpoint, or a hub id (a first download needs a network)."
        raise UsageError(f"the base cannot be loaded: {str(error).strip().splitlines()[0]}", base, fix) from error
    return found


def _adapted(job: Job, recipe: Recipe, make: Callable[[], Any]) -> tuple[Any, Adapters]:
    """A UNet with the adapters of a run. Of a method that looks at their values, which are not there, with as many of the same rank."""
    files = {role: (path, read(path).modules) for role, path in job.loras.items()}
    with quiet(), torch.device("meta"):
        unet, rng = make(), torch.Generator("cpu")
        adapters = attach_to(unet, files, job.base) or Adapters.attach(unet, recipe.targets)
        try:
            if recipe.steps:  # else what it prepares is its result, and nothing is trained
                recipe.prepare(adapters, rng)
        except RuntimeError:  # torch's, on the meta device
            unet = make()
            adapters = Adapters.attach(unet, recipe.targets)
            active = {one.adapter for branch in recipe.branches(0) for one in branch.active}
            for name in sorted(active | {name for name, _ in recipe.rates}):
                adapters.new(name, job.settings.get("rank", 64), rng)
    return unet, adapters


def _typed(config: dict[str, Any], dtype: torch.dtype) -> Any:
    unet: Any = empty_unet(config)
    return unet.requires_grad_(False).to(dtype)


def _activations(unet: nn.Module, adapters: Adapters, recipe: Recipe, preset: Preset) -> int:
    """Of the largest group of branches that share a forward pass, late in the run, when all take part."""
    branches = recipe.branches(max(recipe.steps - 1, 0))[: 1 if recipe.in_turn else preset.at_once]
    if not recipe.steps or not branches:
        return 0
    ledger = _Ledger({id(one.untyped_storage()) for one in (*unet.parameters(), *unet.buffers())})
    with ledger.keeping(unet), _Fused():
        _forward(unet, adapters, branches)
    if not preset.checkpointing:
        return ledger.outside + sum(ledger.inside)
    return ledger.outside + sum(ledger.inputs) + max(ledger.inside, default=0)


def _forward(unet: Any, adapters: Adapters, branches: tuple[Branch, ...]) -> Tensor:
    config, rows = unet.config, len(branches)
    prompts = {active.prompt for branch in branches for active in branch.active if active.prompt}
    texts = {
        role: torch.empty(TOKENS, config["cross_attention_dim"], device="meta", dtype=unet.dtype) for role in prompts
    }
    noisy = torch.empty(rows, config["in_channels"], *[config["sample_size"]] * 2, device="meta", dtype=unet.dtype)
    added = None
    if config["addition_embed_type"]:
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {name: torch.empty(rows, n, device="meta") for name, n in (("text_embeds", pooled), ("time_ids", 6))}
    text = torch.empty(rows, TOKENS, config["cross_attention_dim"], device="meta", dtype=unet.dtype)
    t = torch.empty(rows, device="meta")
    with adapters.activate([branch.active for branch in branches], texts):
        return unet(noisy, t, encoder_hidden_states=text, added_cond_kwargs=added).sample


class _Ledger:
    """Bytes that autograd keeps: in each unit of checkpointing, outside them, and what goes into the units."""

    def __init__(self, ignored: set[int]) -> None:
        self.seen, self.outside, self.inside, self.inputs = ignored, 0, [], []
        self.alive: list[Any] = []  # so that no storage's id is used twice
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

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.inputs.append(args[0].numel() * args[0].element_size())
        self.inside.append(0)
        self.within = True

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.within = False

    @contextmanager
    def keeping(self, unet: nn.Module) -> Iterator[None]:
        units = [module for module in unet.modules() if isinstance(module, UNITS)]
        hooks = [unit.register_forward_pre_hook(self.enter) for unit in units]
        hooks += [unit.register_forward_hook(self.leave) for unit in units]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x):
                yield
        finally:
            for hook in hooks:
                hook.remove()


class _FusedAttention(torch.autograd.Function):
    """What fused attention keeps: its inputs and its output, never the matrix of weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("nothing is computed here")


class _Fused(TorchFunctionMode):
    """Fused attention on the meta device, where torch itself would spell it out."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))
