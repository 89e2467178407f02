"""Break-for-Make as its authors' code behaves (ICTMCG/Break-for-make, commit 7898be7), for comparison. Written from a
description of the code.

In `break`, every loss trains both factors. A step is: the loss on the module's own picture; a step of the module's own
factor, whose gradient still contains that of the partners' loss of the step before; the loss on the partners; a step of
the other factor, whose gradient contains both losses. Each factor is clipped by itself. Weight decay of 1e-2 also shrinks
the frozen halves. `make` initialises some layers again after it has loaded them.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from unbraid.core.adapters import Adapters
from unbraid.core.lora import Factors, Part
from unbraid.core.optim import AdamW, Rates, groups
from unbraid.core.recipe import Optimization, Recipe

WEIGHT_DECAY, CLIP = 1e-2, 1.0
WIDTH = 1280  # of the basis from which the published code takes the frozen halves, in layers of any width
REDRAWN = re.compile(r"\.(attn2\.to_q|attn1\.to_[qkv])$")  # 280 of SDXL's 560 layers


def official(recipe: Recipe, own: Part) -> Recipe:
    """The recipe of `break` with the published order of updates, clipping and weight decay. `own`: the module's factor."""
    rates = {key: replace(rate, weight_decay=WEIGHT_DECAY) for key, rate in recipe.rates.items()}
    branches, discard = len(recipe.branches(0)), recipe.hooks.after_step

    def after_step(adapters: Adapters, step: int) -> bool | None:
        decay_frozen(adapters, rates)
        return discard(adapters, step) if discard else None

    return replace(
        recipe,
        rates=rates,
        passes=replace(recipe.passes, in_turn=True),
        optimization=Optimization(lambda adapters, rates: Turns(adapters, rates, own, branches), clip=None),
        hooks=replace(recipe.hooks, after_step=after_step),
    )


class Turns(AdamW):
    """AdamW for two factors that step in turn, the module's own first, over the `branches` of one training step.

    The trainer calls `step` and `zero_grad` after every branch: after the first one the own factor steps, after the last
    one the other factor. What the partners' loss adds to the own factor's gradient is kept in the state for its next step."""

    def __init__(self, adapters: Adapters, rates: Rates, own: Part, branches: int) -> None:
        super().__init__(groups(adapters, rates))
        self.own = {id(getattr(one, own)) for one in adapters.pieces_of("module")}
        self.branches, self.done = branches, 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the factor whose turn it is, if any."""
        del closure
        for parameters in self._turns():
            for p in parameters:
                kept = self.state[p].pop("kept", None)
                if kept is not None:
                    p.grad = kept if p.grad is None else p.grad + kept
            held = self._hold(parameters)
            _clip([p.grad for p in parameters if p.grad is not None])
            super().step()
            for p, grad in held:
                p.grad = grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the factor that has stepped; at the end of a training step, also those of the other one."""
        for parameters in self._turns():
            for p in parameters:
                p.grad = None
        self.done += 1
        if self.done < self.branches:
            return
        self.done = 0
        for p in self._parameters():
            if self.state[p]:  # it has stepped; all states have the same entries, so that they can be saved
                self.state[p]["kept"] = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = None

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _turns(self) -> list[list[Tensor]]:
        """The factors that step after this branch: none, one, or, if there is only one branch, both."""
        first = [[p for p in self._parameters() if id(p) in self.own]] if self.done == 0 else []
        last = [[p for p in self._parameters() if id(p) not in self.own]] if self.done + 1 == self.branches else []
        return [*first, *last]

    def _hold(self, parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Take the gradients of all other parameters away, so that only these step. Returns them."""
        mine = {id(p) for p in parameters}
        held = [(p, p.grad) for p in self._parameters() if id(p) not in mine and p.grad is not None]
        for p, _ in held:
            p.grad = None
        return held


def _clip(gradients: list[Tensor]) -> None:
    if gradients:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (CLIP / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def decay_frozen(adapters: Adapters, rates: Rates) -> None:
    """Shrink the frozen halves as AdamW's weight decay shrinks what is trained."""
    for factors in adapters.pieces_of("module"):
        assert factors.fixed
        for part, frozen in (("down", factors.fixed.down), ("up", factors.fixed.up)):
            rate = rates.get(("module", part))  # type: ignore[arg-type]
            if rate:
                frozen.mul_(1 - rate.lr * rate.weight_decay)


def is_redrawn(name: str, factors: Factors) -> bool:
    """Whether the published constructor initialises a layer again after it has loaded it: square layers among the queries,
    and the keys and values of self-attention."""
    return bool(REDRAWN.search(name)) and len(factors.up) == factors.down.shape[1]


@torch.no_grad()
def redraw(factors: Factors, rng: torch.Generator) -> None:
    """Initialise all of down, and the frozen half of up, again.

    The frozen halves are rows of one matrix `[WIDTH, r]` with orthonormal columns, different rows for each; their entries
    have a standard deviation of WIDTH^-0.5. The rest of down is N(0, 1/r²). The trained half of up, the style, is kept."""
    fixed = factors.fixed
    assert fixed
    rank, k = factors.down.shape
    basis = torch.linalg.qr(torch.randn(max(WIDTH, k), rank, generator=rng)).Q.to(factors.down)
    columns, rows = fixed.columns == 0, fixed.rows == 0
    order = torch.randperm(len(basis), generator=rng)
    chosen, others = order[: int(columns.sum())], order[int(columns.sum()) :].sort().values
    fixed.down, fixed.up = torch.zeros_like(factors.down), torch.zeros_like(factors.up)
    fixed.down[:, columns] = basis[chosen].T
    fixed.up[rows] = basis[others[: int(rows.sum())]]
    fixed.down_ranks, fixed.up_ranks = torch.ones_like(fixed.down_ranks), torch.ones_like(fixed.up_ranks)
    factors.down.copy_(torch.randn(rank, k, generator=rng) / rank)
