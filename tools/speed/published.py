"""Training steps in the published form of each method, written from the formulas. `tools.speed` compares ours with them.

UnZipLoRA computes ΔW = g ⊙ B A, `[d, k]`, for every layer and adapter, and applies it. ZipLoRA keeps dense ΔW and computes
Σ m ⊙ ΔW in every call. The others are factorised, layer by layer, and every factor gets a gradient. Each branch and each
teacher is a separate call of the UNet, and all pictures go through the autoencoder at every step. Masks, gates, penalties
and schedules are those of our recipes.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.bases.base import Base, Picture, RunData
from unbraid.bases.families.family import Prompt
from unbraid.core.adapters import AdaptedLinear, Adapters
from unbraid.core.lora import Active, Factors
from unbraid.core.memory_format import channels_last
from unbraid.core.passes import SMALL
from unbraid.core.recipe import Recipe

Pictures = Mapping[str, Sequence[Picture]]
Form = Callable[[Tensor, Sequence[tuple[Factors, Active]]], Tensor]  # x, active adapters → what they add to the output


def dense_product(x: Tensor, ours: Sequence[tuple[Factors, Active]]) -> Tensor:
    """UnZipLoRA: x through W = g · mask ⊙ (B A), which is computed in every call."""
    ((factors, active),) = ours
    weight = factors.up @ factors.down * (factors.scale * active.scale)
    gate = factors.gate(factors.channels)
    return F.linear(x, (weight if gate is None else weight * gate[:, None]).to(x.dtype))


def dense_sum(x: Tensor, ours: Sequence[tuple[Factors, Active]]) -> Tensor:
    """ZipLoRA: x through Σ m ⊙ ΔW with dense ΔW that are kept; for a teacher, ΔW without m."""
    parts = []
    for factors, active in ours:
        weight = kept_delta(factors)
        parts.append(weight * factors.columns if active.merger and factors.columns is not None else weight)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return F.linear(x, total.to(x.dtype))


def kept_delta(factors: Factors) -> Tensor:
    """The dense ΔW of a LoRA that is not trained, computed once."""
    if "dense" not in factors.__dict__:
        factors.__dict__["dense"] = (factors.up @ factors.down).detach() * factors.scale
    return factors.__dict__["dense"]


def factorised(x: Tensor, ours: Sequence[tuple[Factors, Active]]) -> Tensor:
    """scale · B (A x), adapter by adapter. If an adapter trains any part, all of its parts get gradients, else none."""
    total = x.new_zeros(())
    for factors, active in ours:
        down, up = factors.plain() if active.trains else factors.plain(active.trains)
        total = total + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * (factors.scale * active.scale)
    return total


class FormulaLinear(nn.Module):
    """A frozen linear layer plus what a formula adds. `each`: call the formula once per adapter, with the adapter's own
    prompt if it has one."""

    def __init__(self, layer: AdaptedLinear, form: Form, each: bool, prompts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layer, self.form, self.each, self.prompts = layer, form, each, prompts
        self.active: tuple[Active, ...] = ()

    @property
    def weight(self) -> Tensor:  # diffusers' attention code looks at its projections' weights
        return self.layer.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer.base(x)
        ours = [(self.layer.adapters[one.adapter], one) for one in self.active if one.adapter in self.layer.adapters]
        for some in [[one] for one in ours] if self.each else [ours] if ours else []:
            prompt = some[0][1].prompt if self.layer.own_prompt else None
            seen = x if prompt is None else self.prompts[prompt].to(x.dtype).expand(len(x), -1, -1)
            y = y + self.form(seen, some)  # type: ignore[arg-type]
        return y


@contextmanager
def formulas(
    unet: nn.Module, adapters: Adapters, form: Form, prompts: Mapping[str, Tensor]
) -> Iterator[Callable[[tuple[Active, ...]], None]]:
    """Replace the adapted layers by formula layers inside the `with` block. Gives a function that sets the active
    adapters."""
    layers = {
        name: FormulaLinear(layer, form, form is dense_product, prompts) for name, layer in adapters.layers.items()
    }
    _put(unet, layers)

    def activate(active: tuple[Active, ...]) -> None:
        for layer in layers.values():
            layer.active = active

    try:
        yield activate
    finally:
        _put(unet, adapters.layers)


def _put(unet: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, layer)


def published(
    base: Base,
    encode: Callable[[], Pictures],
    prompts: Mapping[str, Prompt],
    recipe: Recipe,
    adapters: Adapters,
    form: Form,
) -> Generator[None]:
    """Run training steps without end, one per item. `encode` encodes the pictures and is called at every step."""
    groups = [
        {key: group[key] for key in ("params", "lr", "weight_decay")}
        for group in recipe.optimization.optimizer(adapters, recipe.rates).param_groups
    ]
    optimizer, rng = torch.optim.AdamW(groups, fused=True), torch.Generator().manual_seed(0)
    parameters = [p for group in groups for p in group["params"]]
    if form is factorised:  # frozen factors get gradients too
        for name in {name for name, _ in recipe.rates}:
            for factors in adapters.of(name).values():
                factors.requires_grad_(True)

    def update() -> None:
        if recipe.optimization.clip is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.optimization.clip)
        optimizer.step()
        optimizer.zero_grad()

    hooks, embeds = recipe.hooks, {role: prompt.embeds for role, prompt in prompts.items()}
    latents = next(iter(encode().values()))[0].mean
    small = latents.device.type == "cpu" and latents[0].numel() <= SMALL
    channels_last(base.denoiser, small)  # the faster memory format for single rows, as in our form
    with formulas(base.denoiser, adapters, form, embeds) as activate:
        for i in count():
            run_data, branches = RunData(base, encode(), prompts), recipe.branches(i)
            samples = run_data.draw([branch.image for branch in branches], recipe.passes.shared, rng)
            losses = []
            for branch, sample in zip(branches, samples, strict=True):
                activate(branch.active)
                out = run_data.predict([sample], [branch.prompt])
                target = sample.target
                if branch.teacher:
                    activate(branch.teacher.active)
                    with torch.no_grad():
                        target = run_data.predict([sample], [branch.teacher.prompt])
                if out.dtype in (torch.float16, torch.bfloat16):
                    out = out.float()  # as the scripts do
                losses.append(branch.weight * F.mse_loss(out, target.to(out.dtype)))
                if not branch.teacher:  # only ZipLoRA adds up all losses before the backward pass
                    losses.pop().backward()
                    if recipe.passes.in_turn and branch is not branches[-1]:
                        update()
            activate(branches[0].active)  # gradient checkpointing runs layers again in the backward pass
            penalty = hooks.penalty(adapters, i) if hooks.penalty else None
            losses += [] if penalty is None else [penalty]
            if losses:
                torch.stack(losses).sum().backward()
            if hooks.after_backward:
                hooks.after_backward(adapters, i)
            update()
            if hooks.after_step:
                hooks.after_step(adapters, i)
            yield
