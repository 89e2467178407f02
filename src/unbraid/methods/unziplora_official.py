"""UnZipLoRA as its authors' code behaves (commit 0dc1800), for comparison. Written from a description of the code.

Both factors start as noise, so the model's output changes from step 0. Channels are scored in one step per period, by
counting entries above a threshold; the gradients are multiplied by fp16's loss scale (emulated here: `loss_scale`). Only channels with
more than the n-th best score are chosen, so at most n - 1. At the first step of a period all gates get an update. The
penalty is symmetric: it removes contested channels from both adapters. An adapter that is used alone is used without its
gates.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch, Factors, Part
from unbraid.core.optim import Rate
from unbraid.core.recipe import Hooks, Recipe
from unbraid.methods.columns import Columns, Ledger, clamp_gates, gates, ledger, pairs, pieces
from unbraid.methods.entry import ROLES

THRESHOLD = 1e-5
CHUNK = 64  # rows of the d×k score that are computed at once


@dataclass(frozen=True)
class Official:
    """Settings of `unziplora` that the recipe of `compat="official"` uses beside the columns' schedule and the rates."""

    rank: int
    overlap: float
    column_separation: bool
    loss_scale: float


def official(columns: Columns, rates: Mapping[tuple[str, Part], Rate], given: Official) -> Recipe:
    """The recipe of `compat="official"`."""

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        for role in ROLES:
            adapters.new(role, given.rank, rng, up_std=1 / given.rank, down_std=1 / given.rank)
        for both in pairs(adapters).values():
            for factors in both:
                like = factors.up.detach()[:, 0]
                factors.channels = nn.Parameter(torch.ones_like(like))
                factors.register_buffer("mask", torch.ones_like(like))
                factors.add_module("ledger", Ledger(like, owned=False))

    def branches(step: int) -> tuple[Branch, ...]:
        return (Branch("image", "both", tuple(Active(role, prompt=role) for role in ROLES)),)

    if not given.column_separation:  # without masks, block separation has no effect either
        frozen_gates = {key: rate for key, rate in rates.items() if key[1] != "merger"}
        return Recipe(prepare, branches, frozen_gates, columns.steps)
    return Recipe(
        prepare,
        branches,
        rates,
        columns.steps,
        hooks=Hooks(
            penalty=lambda adapters, step: _penalty(adapters, given.overlap) if _gated(columns, step) else None,
            after_backward=lambda adapters, step: _after_backward(adapters, columns, step, given.loss_scale),
            after_step=lambda adapters, step: _after_step(adapters, columns, step),
        ),
    )


def _gated(columns: Columns, step: int) -> bool:
    """Whether gates are applied: not in the very first step, nor in the second step of each period."""
    return step > 0 and step % columns.period != 1


def _after_backward(adapters: Adapters, columns: Columns, step: int, loss_scale: float) -> None:
    phase = step % columns.period
    if phase == 1:
        for name, both in pairs(adapters).items():
            counts = tuple(_count(factors, loss_scale) for factors in both)
            _select(*both, counts, columns.ratio, columns.exempt(name))
    for both in pieces(adapters):
        shared = ledger(both[0]).owned & ledger(both[1]).owned
        for factors in both:
            if phase == 1 or step == 0:
                gates(factors).grad = None  # gates are switched off: no update, no decay
            elif phase != 0:  # at phase 0 the filter is skipped: every gate moves
                gradient = gates(factors).grad
                assert gradient is not None
                gradient *= shared


def _after_step(adapters: Adapters, columns: Columns, step: int) -> None:
    clamp_gates(adapters)
    last = step + 1 == columns.steps  # gating is forced on before saving
    gated = last or _gated(columns, step + 1)
    for both in pieces(adapters):
        for factors in both:
            assert factors.mask is not None
            factors.mask.copy_(ledger(factors).owned | (not gated))


def _select(content: Factors, style: Factors, counts: tuple[Tensor, ...], ratio: float, exempt: str | None) -> None:
    c, s = ledger(content), ledger(style)
    n, (for_c, for_s) = int(ratio * len(c.owned)), counts
    if exempt == "content":
        c.owned.fill_(True)
        s.owned |= _above(for_s, n)
    elif exempt == "style":
        s.owned.fill_(True)
        c.owned |= _above(for_c, n)
    else:
        c.owned |= _above(for_c, n)
        s.owned |= _above(for_s.masked_fill(c.owned, -torch.inf), n)


def _above(score: Tensor, n: int) -> Tensor:
    """Channels strictly above the n-th best score: n - 1 of them, fewer with ties."""
    return score > score.topk(n).values.min()


@torch.no_grad()
def _count(factors: Factors, loss_scale: float) -> Tensor:
    """For each output j, the share of inputs i with |W_ji · M_ji| over the threshold, [d]; W = B A and
    M = g ⊙ (B ∂A + ∂B A)."""
    down_grad, rows = factors.gradient("down"), []
    parts = (factors.up.split(CHUNK), factors.gradient("up").split(CHUNK), gates(factors).split(CHUNK))
    for up, up_grad, gate in zip(*parts, strict=True):
        change = gate[:, None] * (up @ down_grad + up_grad @ factors.down)
        rows.append(((up @ factors.down * change * loss_scale).abs() > THRESHOLD).float().mean(1))
    return torch.cat(rows)


def _penalty(adapters: Adapters, weight: float) -> Tensor:
    """λ · mean over layers of mean_j |g_c k_c g_s k_s|, with gates g and masks k of content and style."""
    terms = []
    for content, style in pieces(adapters):
        both = ledger(content).owned & ledger(style).owned
        terms.append((gates(content) * gates(style) * both).abs().mean(-1).flatten())
    return weight * torch.cat(terms).mean()
