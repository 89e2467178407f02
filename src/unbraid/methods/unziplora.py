"""UnZipLoRA: one image → a content LoRA and a style LoRA (arXiv 2412.04465).

Each step is one forward pass with both adapters active; in cross-attention keys and values each reads its own prompt.
Column separation gives each adapter its own output channels, a tenth of them per period. Block separation makes an
exception: in blocks that are known to control content (or style), the content (or style) adapter uses all channels. A
channel that both adapters use is contested, and a penalty drives the gate of one of them to zero.

The differences from the published code, and the reasons, are in docs/unziplora.md; `compat="official"`
(unziplora_official.py) reproduces the published behaviour.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, inf
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch, Part
from unbraid.core.optim import Rate
from unbraid.core.recipe import Hooks, Recipe
from unbraid.methods.columns import Columns, Ledger, clamp_gates, gates, ledger, most_ratio, pairs, pieces
from unbraid.methods.entry import ONE_PICTURE, ROLES, Blocks, Entry, Output, Publication, split_outputs
from unbraid.methods.further import with_leak, with_prior, with_style_steps
from unbraid.methods.losses import with_x0_loss
from unbraid.methods.unziplora_official import Official, official
from unbraid.methods.windows import with_windows

FACTORS: tuple[Part, ...] = ("down", "up")


def unziplora(
    blocks: Blocks,
    *,
    rank: int = 64,
    steps: int = 600,
    content_lr: float = 5e-5,
    style_lr: float = 5e-5,
    merger_lr: float = 5e-3,
    weight_decay: float = 1e-4,
    sample_times: int = 3,
    column_ratio: float = 0.1,
    overlap: float = 0.5,
    window: int = 16,
    column_separation: bool = True,
    block_separation: bool = True,
    content_alone: float = 0.0,
    style_alone: float = 0.0,
    segments: bool = False,
    loss_scale: float = 65536.0,
    compat: Literal["none", "official"] = "none",
) -> tuple[Recipe, ...]:
    """Split one image.

    rank: of each adapter. steps: optimiser steps. content_lr: AdamW's learning rate for the content adapter. style_lr:
    AdamW's learning rate for the style adapter. merger_lr: AdamW's learning rate for the gates. weight_decay: AdamW's, for
    the adapters (with `official`, for the gates too). sample_times: periods of column separation. column_ratio: share of
    the channels that each adapter is granted per period. overlap: weight λ of the penalty on channels that both adapters
    use. window: steps per period in which channels are scored; by default at most the whole period. column_separation:
    whether each adapter gets its own output channels. block_separation: whether an adapter uses all channels in the blocks
    that control its role. content_alone, style_alone: weight of an additional loss with this adapter alone, under its own
    prompt; 0 as published. segments: on Flux.1 and SD3.5, each step has one pass in which the text is [joint | content |
    style], three segments that cannot read each other, and each adapter acts on its own segment and on the picture;
    content_alone and style_alone are then 0 by default. loss_scale: with `official`, what gradients are multiplied by before the threshold that channels
    are scored with; 65536 is that of fp16 training, 1 that of bf16. compat: `official` reproduces the published code,
    defects included.
    """
    columns = Columns(steps, sample_times, column_ratio, window, blocks if block_separation else {})
    columns.check(needs_window=column_separation and compat == "none")
    lrs: dict[str, float] = {"content": content_lr, "style": style_lr}
    rates: dict[tuple[str, Part], Rate] = {
        (role, part): Rate(lrs[role], weight_decay) for role in ROLES for part in FACTORS
    }
    if compat == "official":
        if segments:
            raise UsageError("the published code has no segments", "setting segments", "Leave out compat=official.")
        rates |= {(role, "merger"): Rate(merger_lr, weight_decay) for role in ROLES}
        return (official(columns, rates, Official(rank, overlap, column_separation, loss_scale)),)
    branches = (
        in_segments() if segments else Branch("image", "both", tuple(Active(role, prompt=role) for role in ROLES)),
        *(alone(role, w) for role, w in (("content", content_alone), ("style", style_alone)) if w),
    )

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        for role in ROLES:
            adapters.new(role, rank, rng)
        if column_separation:
            add_ledgers(adapters, columns)

    recipe = Recipe(prepare, lambda step: branches, rates, steps)
    return (separated(recipe, columns, merger_lr, overlap) if column_separation else recipe,)


def alone(role: str, weight: float) -> Branch:
    """One adapter, under its own prompt."""
    return Branch("image", role, (Active(role, prompt=role),), weight=weight)


def in_segments() -> Branch:
    """Both adapters, where the text is [joint | content | style]: each acts on its own segment and on the picture."""
    texts = ("both", *ROLES)
    active = tuple(Active(role, prompt=role, segment=(texts.index(role), len(texts))) for role in ROLES)
    return Branch("image", "+".join(texts), active)


def separated(recipe: Recipe, columns: Columns, merger_lr: float, overlap: float) -> Recipe:
    """Add column separation to a recipe: trained gates, the penalty, and the hooks that update ledgers and gates."""
    return replace(
        recipe,
        rates={**recipe.rates, **{(role, "merger"): Rate(merger_lr) for role in ROLES}},
        hooks=Hooks(
            penalty=lambda adapters, step: overlap_penalty(adapters, overlap),
            after_backward=lambda adapters, step: _after_backward(adapters, columns, step),
            after_step=lambda adapters, step: clamp_gates(adapters),
        ),
    )


def add_ledgers(adapters: Adapters, columns: Columns) -> None:
    """Give every layer a ledger and, where channels can be contested, gates g = 1. No mask is needed: `up` starts at zero
    and only its owned rows change, so all other channels add exactly nothing. They still have gradients, by which they
    are scored without disturbing the model."""
    for name, both in pairs(adapters).items():
        for role, factors in zip(ROLES, both, strict=True):
            like = factors.up.detach()[:, 0]
            if columns.exempt(name):
                factors.channels = nn.Parameter(torch.ones_like(like))
            factors.add_module("ledger", Ledger(like, owned=columns.exempt(name) == role))


def _after_backward(adapters: Adapters, columns: Columns, step: int) -> None:
    again = step >= columns.steps  # the style trains beside the finished content
    every = [factors for both in pieces(adapters) for factors in (both[1:] if again else both)]
    if columns.scoring(step):
        for factors in every:
            ledger(factors).score += _gradient(factors.up).norm(dim=-1)
    torch._foreach_mul_([_gradient(one.up) for one in every], [ledger(one).owned[..., None] for one in every])
    if gated := [one for one in every if one.channels is not None]:
        torch._foreach_mul_([_gradient(one.channels) for one in gated], [ledger(one).losing for one in gated])
    if columns.granting(step):
        for name, (content, style) in pairs(adapters).items():
            grant(ledger(content), ledger(style), columns.ratio, columns.exempt(name))


def _gradient(parameter: nn.Parameter | None) -> Tensor:
    assert parameter is not None and parameter.grad is not None
    return parameter.grad


def grant(content: Ledger, style: Ledger, ratio: float, exempt: str | None) -> None:
    """Grant exactly ⌊ratio·d⌋ further channels to each adapter that does not use all of them; content chooses first.

    `exempt`: the adapter that uses all channels of this layer, if any. A channel's score is the norm of its row of `up`'s
    gradient, summed over the window: the gain of switching it on, to first order. A contested channel goes to the adapter
    with the higher score, relative to that adapter's mean in the layer."""
    n = int(ratio * len(content.owned))
    if exempt is None:
        _take_best(content, n, content.owned | style.owned)
        _take_best(style, n, content.owned | style.owned)
    else:
        sparse, full = (content, style) if exempt == "style" else (style, content)
        fresh = _take_best(sparse, n, sparse.owned)
        wins = sparse.score / sparse.score.mean() >= full.score / full.score.mean()
        full.losing |= fresh & wins
        sparse.losing |= fresh & ~wins
    content.score.zero_()
    style.score.zero_()


def _take_best(book: Ledger, n: int, taken: Tensor) -> Tensor:
    """Grant the n channels with the highest scores that are not taken. Returns them as a mask. Ties go to the lower
    index."""
    order = torch.argsort(book.score.masked_fill(taken, -torch.inf), descending=True, stable=True)
    fresh = torch.zeros_like(taken)
    fresh[order[:n]] = True
    fresh &= ~taken  # fewer than n may be left
    book.owned |= fresh
    return fresh


def overlap_penalty(adapters: Adapters, weight: float) -> Tensor | None:
    """λ · mean over layers of mean_j |g_loser · stopgrad(g_winner)|, over contested channels j (arXiv 2412.04465, but with
    a gradient for the loser's gate only)."""
    terms = []
    for both in pieces(adapters):
        if both[0].channels is not None:
            (content, style), (lost, won) = map(gates, both), (ledger(one).losing for one in both)
            contested = content * style.detach() * lost + style * content.detach() * won
            terms.append(contested.abs().mean(-1).sum())
    return weight / len(adapters.layers) * torch.stack(terms).sum() if terms else None


def outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """A content and a style LoRA. The published code applies gates only when both are used together, so `official` writes
    two more files for that."""
    if settings.get("compat") != "official":
        return split_outputs(settings)
    alone = {role: Output((role,), role, gates=False) for role in ROLES}
    return alone | {f"{role}_joint": Output((role,), role) for role in ROLES}


LIMITS = {
    "window": lambda settings: ceil(settings["steps"] / settings["sample_times"]),
    "column_ratio": lambda settings: most_ratio(settings["sample_times"]),
    "content_alone": lambda settings: 0.0 if settings["segments"] else inf,
    "style_alone": lambda settings: 0.0 if settings["segments"] else inf,
}
SHORTEST = {"content_lr": 1e-2, "style_lr": 1e-2, "window": 1, "sample_times": 1, "column_ratio": 0.5}
ENTRIES = (
    Entry(
        "unziplora",
        "split",
        with_x0_loss(with_windows(with_leak(with_prior(ROLES)(with_style_steps(unziplora))))),
        {
            "both": "a {rare} {subject} in {style} style",
            "content": "a {rare} {subject}",
            "style": "a {subject} in {style} style",
            "prior": "a {subject}",
        },
        outputs,
        Publication("UnZipLoRA", "arXiv 2412.04465"),
        replace(ONE_PICTURE, shortest=SHORTEST, limits=LIMITS, reads_blocks=True),
    ),
)
