"""UnZipLoRA: one image → a content LoRA and a style LoRA (arXiv 2412.04465).

One forward pass per step: both adapters work at once, each reading its own prompt in cross-attention keys
and values. Column separation gives each adapter its own output channels, a tenth of them per period; block
separation exempts the adapter that a block is known to serve. Where an exempt adapter meets the other
one's channels, a penalty drives the gate of one of the two to zero.

What differs from the published code by default, and why, is in docs/unziplora.md; `compat="official"`
(unziplora_official.py) is the published behaviour.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn

from unbraid.adapters import Adapters
from unbraid.errors import UsageError
from unbraid.lora import Active, Branch, Factors, Part
from unbraid.optim import Rate
from unbraid.recipe import Recipe

ROLES = ("content", "style")
Blocks = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Columns:
    """Column separation: `times` periods, each opening with a scoring window and granting `ratio` of the channels."""

    steps: int
    times: int
    ratio: float
    window: int
    blocks: Blocks

    def check(self, needs_window: bool) -> None:
        if not 0 < self.ratio * self.times <= 1:
            what, fix = f"column_ratio {self.ratio} × sample_times {self.times}", "Their product may be at most 1."
            raise UsageError(what, "unziplora", fix)
        if needs_window and not 1 <= self.window <= self.period:
            what = f"window {self.window} does not fit a period of {self.period} steps"
            raise UsageError(what, "unziplora", "Shorten it.")

    @property
    def period(self) -> int:
        return ceil(self.steps / self.times)

    def scoring(self, step: int) -> bool:
        return step % self.period < self.window

    def granting(self, step: int) -> bool:
        return step % self.period == self.window - 1

    def exempt(self, layer: str) -> str | None:
        """The adapter that uses every channel of this layer, if any."""
        return next((role for role in ROLES if layer.startswith(self.blocks.get(role, ()))), None)


class Ledger(nn.Module):
    """One adapter's books on one layer's output channels, kept beside its factors so that they are saved with them.

    owned [d]: granted so far. losing [d]: contested, and the other adapter won. score [d]: importance, summed.
    """

    owned: Tensor
    losing: Tensor
    score: Tensor

    def __init__(self, like: Tensor, owned: bool) -> None:
        super().__init__()
        self.register_buffer("owned", torch.full_like(like, owned, dtype=torch.bool))
        self.register_buffer("losing", torch.zeros_like(like, dtype=torch.bool))
        self.register_buffer("score", torch.zeros_like(like))


def ledger(factors: Factors) -> Ledger:
    books = factors.ledger
    assert isinstance(books, Ledger)
    return books


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
    compat: Literal["none", "official"] = "none",
) -> tuple[Recipe, ...]:
    """Split one image.

    rank: of each adapter. steps: optimiser steps. content_lr, style_lr, merger_lr: AdamW rates of the two
    adapters and of their gates. weight_decay: of the adapters (official: of the gates too). sample_times:
    periods of column separation. column_ratio: share of channels granted per period. overlap: weight λ of the
    penalty. window: steps over which channels are scored. column_separation, block_separation: on or off.
    content_alone, style_alone: weight of one more loss, that adapter alone under its own prompt (0: as published).
    compat: `official` reproduces the published code, defects included.
    """
    columns = Columns(steps, sample_times, column_ratio, window, blocks if block_separation else {})
    columns.check(needs_window=column_separation and compat == "none")
    lrs: dict[str, float] = {"content": content_lr, "style": style_lr}
    factors: tuple[Part, ...] = ("down", "up")
    rates: dict[tuple[str, Part], Rate] = {
        (role, part): Rate(lrs[role], weight_decay) for role in ROLES for part in factors
    }
    if compat == "official":
        from unbraid.methods.unziplora_official import official

        rates |= {(role, "merger"): Rate(merger_lr, weight_decay) for role in ROLES}
        return (official(columns, rates, rank, overlap, column_separation),)
    alone = {"content": content_alone, "style": style_alone}
    branches = (
        Branch("image", "both", tuple(Active(role, prompt=role) for role in ROLES)),
        *(Branch("image", role, (Active(role, prompt=role),), weight=w) for role, w in alone.items() if w),
    )

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        for role in ROLES:
            adapters.new(role, rank, rng)
        if column_separation:
            open_books(adapters, columns)

    recipe = Recipe(prepare, lambda step: branches, rates, steps)
    return (separated(recipe, columns, merger_lr, overlap) if column_separation else recipe,)


def separated(recipe: Recipe, columns: Columns, merger_lr: float, overlap: float) -> Recipe:
    """The same with column separation: gates that train, the penalty, and the ledgers' two hooks."""
    return replace(
        recipe,
        rates={**recipe.rates, **{(role, "merger"): Rate(merger_lr) for role in ROLES}},
        penalty=lambda adapters, step: overlap_penalty(adapters, overlap),
        after_backward=lambda adapters, step: _after_backward(adapters, columns, step),
        after_step=lambda adapters, step: clamp_gates(adapters),
    )


def pairs(adapters: Adapters) -> dict[str, tuple[Factors, Factors]]:
    """(content, style) factors by layer."""
    content, style = (adapters.of(role) for role in ROLES)
    return {name: (one, style[name]) for name, one in content.items()}


def pieces(adapters: Adapters) -> list[tuple[Factors, Factors]]:
    """(content, style) of every stack of layers, or of every layer where nothing is packed."""
    content, style = ROLES
    return [(some[content], some[style]) for some in adapters.pieces()]


def open_books(adapters: Adapters, columns: Columns) -> None:
    """Give every layer its ledger, and its gates g = 1 where channels can be contested. No mask is needed: `up` starts at zero and only owned rows
    of it ever change, so every other channel adds exactly nothing, and still has a gradient by which it can be
    scored without disturbing the model."""
    for name, both in pairs(adapters).items():
        for role, factors in zip(ROLES, both, strict=True):
            like = factors.up.detach()[:, 0]
            if columns.exempt(name):
                factors.channels = nn.Parameter(torch.ones_like(like))
            factors.add_module("ledger", Ledger(like, owned=columns.exempt(name) == role))


def _after_backward(adapters: Adapters, columns: Columns, step: int) -> None:
    every = [factors for both in pieces(adapters) for factors in both]
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
    """Exactly ⌊ratio·d⌋ further channels for each adapter that is not exempt; content chooses first.

    A channel's importance is the norm of its row of `up`'s gradient, summed over the window: the first-order
    gain of switching it on, without a threshold or a scale. A contested channel goes to the adapter to which
    it matters more, relative to that adapter's mean in the layer."""
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


def _take_best(books: Ledger, n: int, taken: Tensor) -> Tensor:
    """Grant the n best-scored channels that are not taken; returns them as a mask. Ties go to the lower index."""
    order = torch.argsort(books.score.masked_fill(taken, -torch.inf), descending=True, stable=True)
    fresh = torch.zeros_like(taken)
    fresh[order[:n]] = True
    fresh &= ~taken  # fewer than n may be left
    books.owned |= fresh
    return fresh


def overlap_penalty(adapters: Adapters, weight: float) -> Tensor | None:
    """λ · mean over layers of mean_j |m_loser · stopgrad(m_winner)| over contested channels."""
    terms = []
    for both in pieces(adapters):
        if both[0].channels is not None:
            (content, style), (lost, won) = map(gates, both), (ledger(one).losing for one in both)
            contested = content * style.detach() * lost + style * content.detach() * won
            terms.append(contested.abs().mean(-1).sum())
    return weight / len(adapters.layers) * torch.stack(terms).sum() if terms else None


def gates(factors: Factors) -> nn.Parameter:
    assert factors.channels is not None
    return factors.channels


@torch.no_grad()
def clamp_gates(adapters: Adapters) -> None:
    for both in pieces(adapters):
        for factors in both:
            if factors.channels is not None:
                factors.channels.clamp_(0.0, 1.0)
