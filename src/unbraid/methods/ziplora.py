"""ZipLoRA: trains several LoRAs to work together without interference (arXiv 2311.13600).

In every layer that two LoRAs share, each gets one coefficient per input column, and nothing else is trained. Under the
prompt of each LoRA, all of them together must predict what that LoRA predicts alone, while a penalty drives the
coefficients of different LoRAs apart. The coefficients can be multiplied into `down` exactly.

Differences from the public re-implementation (`compat="official"`): at its learning rate of 5e-5 no coefficient changes by
more than 0.005 in 100 steps, so its result is the plain sum. At the paper's rate of 0.01, its similarity term, and the raw
dot product in the paper's formula, shrink all LoRAs together. The cosine, which the paper's text describes, does neither.
The default granularity is `rank` (DuoLoRA's ZipRank), which measured better (docs/ziplora.md); ZipLoRA's own is `column`.
DuoLoRA's layer prior is an option; its cycle loss is not implemented.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.common.errors import UnsuitedError, UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch, Factors
from unbraid.core.optim import Rate, Rates
from unbraid.core.recipe import Hooks, Passes, Recipe
from unbraid.core.selectors import selects
from unbraid.methods.entry import ROLES, TWO_LORAS, Blocks, Entry, Publication, zip_outputs

Similarity = Literal["cos", "dot", "product"]
SIMILARITIES: dict[Similarity, Callable[[Tensor, Tensor], Tensor]] = {  # [n, k], [n, k] → [n]
    "cos": lambda a, b: F.cosine_similarity(a, b, dim=1).abs(),
    "dot": lambda a, b: (a * b).sum(1).abs(),
    "product": lambda a, b: (a * b).abs().mean(1),
}


def ziplora(
    blocks: Blocks,
    *,
    roles: tuple[str, ...] = ("content", "style"),
    granularity: Literal["rank", "column", "row", "layer"] = "rank",
    similarity: Similarity = "cos",
    weight: float = 0.01,
    layer_prior: float = 0.0,
    lr: float = 0.01,
    weight_decay: float = 0.0,
    steps: int = 100,
    tolerance: float = 0.0,
    clamp: bool = False,
    shared_noise: bool = True,
    single: bool = False,
    compat: Literal["none", "official"] = "none",
) -> tuple[Recipe, ...]:
    """Zip LoRAs together.

    roles: the LoRAs' names (set by the command). granularity: one coefficient per rank (ZipRank; per column in layers where
    the ranks differ and cannot be compared), input column (ZipLoRA), output row, or layer. similarity: the penalty on two
    LoRAs' coefficients in a layer: |cos|, |dot product|, or mean |product|. weight: factor λ of the sum of similarities over
    layers. layer_prior: weight of DuoLoRA's penalty on layers of low resolution in which the style has larger coefficients than
    the content; 0.1 in its paper. lr: AdamW's learning rate for the coefficients. weight_decay: AdamW's. steps: optimiser steps at most. tolerance:
    stop when the mean similarity over layers is below it. clamp: keep coefficients in 0..1. shared_noise: use one noise and
    one timestep for all LoRAs of a step, as published. single: write one file, with the sum of the ranks, in place of one
    per LoRA. compat: `official` is the public re-implementation (product, 5e-5, decay).
    """
    coarse = blocks.get("coarse", ())
    if layer_prior and not coarse:
        what, fix = "which layers of this base have a low resolution is not known", "Leave layer_prior out."
        raise UnsuitedError(what, "ziplora", fix)
    if compat == "official":
        granularity, similarity, lr, weight_decay, tolerance, clamp = "column", "product", 5e-5, 1e-4, 0.0, False
    student = tuple(Active(role, trains=frozenset({"merger"})) for role in roles)
    branches = tuple(Branch(role, role, student, Branch(role, role, (Active(role, merger=False),))) for role in roles)

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        del rng
        layers = _shared(layer.factors() for layer in adapters.layers.values())
        if not layers:
            fix = "Merge them instead: without a common layer they cannot interfere."
            raise UsageError("the LoRAs have no layer in common", " and ".join(roles), fix)
        for layer in layers:
            alike = len({len(one.down) for one in layer}) == 1
            for factors in layer:
                open_coefficients(factors, granularity if alike or granularity != "rank" else "column")

    def penalty(adapters: Adapters, step: int) -> Tensor | None:
        del step
        total = weight * similarities(adapters, similarity).sum()
        if layer_prior:
            total = total + layer_prior * excess(adapters, coarse)
        return total if total.requires_grad else None

    rates: Rates = {(role, "merger"): Rate(lr, weight_decay) for role in roles}
    passes = Passes(shared=frozenset(("noise", "timestep")) if shared_noise else frozenset(), fixed_teachers=True)
    hooks = Hooks(penalty, after_step=lambda adapters, step: _stops(adapters, similarity, clamp, tolerance))
    return (Recipe(prepare, lambda step: branches, rates, steps, passes, hooks=hooks),)


@torch.no_grad()
def _stops(adapters: Adapters, similarity: Similarity, clamp: bool, tolerance: float) -> bool:
    """Clamp the coefficients to 0..1 if wanted. Returns whether their mean similarity is below `tolerance`."""
    if clamp:
        for merger in (merger for some in _shared(adapters.pieces()) for one in some for merger in one.mergers()):
            merger.clamp_(0, 1)
    return tolerance > 0 and bool(similarities(adapters, similarity).mean() < tolerance)


def _shared(layers: Iterable[Mapping[str, Factors]]) -> list[list[Factors]]:
    """The factors of every layer that more than one LoRA changes. (Other layers have no coefficients.)"""
    return [list(layer.values()) for layer in layers if len(layer) > 1]


def open_coefficients(factors: Factors, granularity: str) -> None:
    """Add coefficients of 1 to factors."""
    rank, k = factors.down.shape
    sizes = {
        "column": ("columns", k),
        "rank": ("ranks", rank),
        "row": ("channels", len(factors.up)),
        "layer": ("channels", 1),
    }
    name, size = sizes[granularity]
    setattr(factors, name, nn.Parameter(factors.down.new_ones(size)))


def similarities(adapters: Adapters, kind: Similarity) -> Tensor:
    """The similarity of coefficients for every shared layer and pair of LoRAs, `[pairs]`. It is 0 if their numbers differ,
    as with different ranks. Coefficients of the same size are compared together, in one operation for hundreds of layers."""
    groups = defaultdict[int, list[tuple[Tensor, Tensor]]](list)
    out = []
    for layer in _shared(adapters.pieces()):
        for first, second in combinations(layer, 2):
            ((a,), (b,)) = first.mergers(), second.mergers()
            if a.shape == b.shape and a.shape[-1] > 1:
                groups[a.shape[-1]].append((a.view(-1, a.shape[-1]), b.view(-1, b.shape[-1])))
            else:
                out.append(a.new_zeros(a[..., 0].numel()))
    for pairs in groups.values():
        first, second = (torch.cat(side) for side in zip(*pairs, strict=True))
        out.append(SIMILARITIES[kind](first, second))
    return torch.cat(out)


def excess(adapters: Adapters, coarse: tuple[str, ...]) -> Tensor:
    """DuoLoRA's layer prior (arXiv 2504.13206), a scalar: by how much the coefficients of the style exceed those of the
    content, Σ max(0, Σ|m_style| − Σ|m_content|) over the shared layers that the selectors `coarse` select. Σ|m| is the
    nuclear norm of diag(m). 0 if there is no such layer."""
    stacks = defaultdict[tuple[nn.Parameter, ...], list[int]](
        list
    )  # coefficients of content and style → places in them
    for name, layer in adapters.layers.items():
        both = [factors for role, factors in layer.factors().items() if role in ROLES]
        if selects(coarse, name) and len(both) == len(ROLES):
            mergers = tuple((one.place.stack if one.place else one).mergers()[0] for one in both)
            stacks[mergers].append(both[0].place.index if both[0].place else 0)
    total = torch.zeros(())
    for (content, style), places in stacks.items():
        content, style = (one.abs().view(-1, one.shape[-1])[places].sum(-1) for one in (content, style))
        total = total.to(content) + (style - content).clamp(min=0).sum()
    return total


def known_as(settings: Mapping[str, Any]) -> str:
    """The name under which results with these settings should be published: `ziprank` with one coefficient per rank."""
    return "ziprank" if settings["granularity"] == "rank" and settings["compat"] == "none" else "ziplora"


TITLE, PAPER = "ZipRank, or ZipLoRA with granularity=column", "arXiv 2504.13206, 2311.13600"
PUBLICATION = Publication(TITLE, PAPER, known_as)
ENTRIES = (Entry("ziplora", "zip", ziplora, {}, zip_outputs, PUBLICATION, TWO_LORAS),)
