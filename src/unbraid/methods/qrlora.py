"""QR-LoRA: a LoRA whose `up` is a frozen orthonormal basis of the layer's strongest outputs, and of whose `down` only an
upper triangle trains (arXiv 2507.04599).

U S Vᵀ is the best approximation of W with rank r, and U S Vᵀ = Q R with Q [d, r] orthonormal. The paper replaces W by
(W − QR) + Q (R + ΔR) and trains ΔR, which is upper triangular and zero at the start. That equals an ordinary LoRA on W with
up = Q and down = ΔR. Q depends only on the base and the rank, so all LoRAs of one base share it: two of them are added by
adding their `down`, at the same rank, and ⟨ΔW_1, ΔW_2⟩ = ⟨ΔR_1, ΔR_2⟩.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.common.progress import tracked
from unbraid.core.adapters import AdaptedLinear, Adapters
from unbraid.core.lora import Active, Branch, Factors, Part
from unbraid.core.optim import Rate
from unbraid.core.recipe import Hooks, Recipe
from unbraid.methods.bases import basis
from unbraid.methods.entry import ONE_PICTURE, ROLES, Blocks, Entry, Input, Inputs, Output, Publication, split_outputs
from unbraid.methods.losses import with_x0_loss

DOWN: frozenset[Part] = frozenset({"down"})


def qrlora(
    blocks: Blocks,
    *,
    rank: int = 64,
    steps: int = 1000,
    lr: float = 1e-4,
    weight_decay: float = 1e-4,
    targets: Literal["attention", "transformers"] = "attention",
) -> tuple[Recipe, ...]:
    """Learn one concept or style with half the trained parameters of a LoRA.

    rank: of the adapter, and of the basis. steps: optimiser steps. lr: AdamW's learning rate. weight_decay: AdamW's.
    targets: which layers train: attention's projections, or all linear layers of the transformers.
    """
    del blocks
    branch = Branch("image", "both", (Active("lora", trains=DOWN),))
    return (replace(_recipe(("lora",), (branch,), Rate(lr, weight_decay), rank, steps), targets=targets),)


def qrsplit(
    blocks: Blocks,
    *,
    rank: int = 64,
    steps: int = 1000,
    lr: float = 1e-4,
    weight_decay: float = 1e-4,
    overlap: float = 0.5,
    content_alone: float = 0.0,
    style_alone: float = 0.0,
) -> tuple[Recipe, ...]:
    """Split one image into two LoRAs on the same basis.

    rank: of each adapter, and of the basis. steps: optimiser steps. lr: AdamW's learning rate. weight_decay: AdamW's.
    overlap: weight of the penalty on what both adapters change alike: the mean over layers of cos² between ΔW of content
    and style, which the shared basis makes cheap and exact. content_alone, style_alone: weight of an additional loss with
    this adapter alone, under its own prompt.
    """
    del blocks
    active = {role: Active(role, trains=DOWN, prompt=role) for role in ROLES}
    alone = {"content": content_alone, "style": style_alone}
    branches = (
        Branch("image", "both", tuple(active.values())),
        *(Branch("image", role, (active[role],), weight=weight) for role, weight in alone.items() if weight),
    )
    recipe = _recipe(ROLES, branches, Rate(lr, weight_decay), rank, steps)
    if not overlap:
        return (recipe,)
    hooks = replace(recipe.hooks, penalty=lambda adapters, step: overlap * squared_cosine(adapters))
    return (replace(recipe, hooks=hooks),)


def _recipe(names: Sequence[str], branches: tuple[Branch, ...], rate: Rate, rank: int, steps: int) -> Recipe:
    """The recipe of adapters on the layers' bases, of which only the upper triangle of `down` trains."""

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        del rng
        if adapters.names:
            raise UsageError("qr-lora starts from its own basis, not from a LoRA", "--from", "Leave it out.")
        layers = list(adapters.layers.items())
        ups = {name: _up(name, layer, rank) for name, layer in tracked(layers, "computing the layers' bases")}
        for adapter in names:
            fresh = {name: Factors(up.new_zeros(rank, _width(adapters, name)), up.clone()) for name, up in ups.items()}
            adapters.add(adapter, fresh)

    def after_backward(adapters: Adapters, step: int) -> None:
        del step
        for factors in (one for name in names for one in adapters.pieces_of(name)):
            assert factors.down.grad is not None
            factors.down.grad.triu_()  # below the diagonal, `down` is zero at the start and stays so

    rates: dict[tuple[str, Part], Rate] = {(name, "down"): rate for name in names}
    return Recipe(prepare, lambda step: branches, rates, steps, hooks=Hooks(after_backward=after_backward))


def _width(adapters: Adapters, name: str) -> int:
    return adapters.layers[name].base.in_features


def _up(name: str, layer: AdaptedLinear, rank: int) -> Tensor:
    """Q of one layer. Raises UsageError if the rank is too high."""
    weight = layer.base.weight
    if not 1 <= rank <= min(weight.shape):
        raise UsageError(f"rank {rank} does not fit {name}", "rank", f"Choose 1 to {min(weight.shape)}.")
    return basis(weight, rank)


def squared_cosine(adapters: Adapters) -> Tensor:
    """The mean over layers of cos²(ΔW_content, ΔW_style), a scalar, from ΔR alone. A layer that has not changed counts 0."""
    found = []
    for some in adapters.pieces():
        content, style = (some[role].down for role in ROLES)
        dot, sizes = (content * style).sum((-2, -1)), [one.square().sum((-2, -1)) for one in (content, style)]
        found.append((dot.square() / (sizes[0] * sizes[1]).clamp_min(1e-20)).flatten())
    return torch.cat(found).mean()


ENTRIES = (
    Entry(
        "qr-lora",
        "learn",
        with_x0_loss(qrlora),
        {"both": "{prompt}"},
        lambda settings: {"lora": Output(("lora",), "both")},
        Publication("QR-LoRA", "arXiv 2507.04599"),
        Inputs((Input("image", "pictures"),)),
    ),
    Entry(
        "qr-split",
        "split",
        with_x0_loss(qrsplit),
        {
            "both": "a {rare} {subject} in {style} style",
            "content": "a {rare} {subject}",
            "style": "a {subject} in {style} style",
        },
        split_outputs,
        Publication("QR-LoRA, split", "arXiv 2507.04599"),
        ONE_PICTURE,
    ),
)
