"""Break-for-Make: content and style learned separately, as modules that can be combined freely (Xu et al., ACM TOG 44(2),
doi 10.1145/3728461).

A LoRA of rank r is divided into blocks: by rows of up, by columns of down, and by ranks (A: the first half, B: the second):

    up = [ P  0 ; u_A  u_B ],   down = [ 0  d_A ; Q  d_B ]

P and Q are frozen and orthonormal, and use different ranks. So ΔW = 0 at the start, yet all other blocks have gradients. A
content module learns d, a style module learns u. Meanwhile pictures of the other kind (partners) train the other factor,
which is discarded at the end. A content module's down with a style module's up gives

    ΔW = [ 0  P d_A ; u_B Q  u_A d_A + u_B d_B ]

Without interaction, u_A = d_B = 0. Then ΔW is exactly the sum of the two modules, and nothing has to be trained. The
differences from the published code, and the reasons, are in docs/b4m.md; `compat="official"` reproduces what of it can run.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.adapters import AdaptedLinear, Adapters
from unbraid.core.lora import Active, Branch, Factors, Fixed, Lora, Part
from unbraid.core.optim import Rate, Rates, adamw, riemannian
from unbraid.core.recipe import Hooks, Optimization, Passes, Recipe, Stop
from unbraid.core.swap import home
from unbraid.methods.b4m_official import is_redrawn, official, redraw
from unbraid.methods.entry import Blocks, Entry, Input, Inputs, Output, Publication, two
from unbraid.methods.losses import with_x0_loss
from unbraid.methods.pair import rows

Kind = Literal["content", "style"]
Halves = Literal["heads", "first"]
KINDS: tuple[Kind, ...] = ("content", "style")
OWN: Mapping[str, Part] = {"content": "down", "style": "up"}
basis = cache(rows)  # all layers of one width share it
PASSES = Passes(shared=frozenset(("noise", "timestep")))
CUT = ("rank", "split", "halves", "interaction", "orthogonal")  # settings that two modules must have in common


def break_(
    blocks: Blocks,
    *,
    kind: Kind = "content",
    rank: int = 64,
    steps: int = 1500,
    lr: float = 1e-4,
    partner_lr: float = 1e-5,
    partner_count: int = 3,
    split: float = 0.5,
    halves: Halves = "heads",
    interaction: bool = False,
    orthogonal: bool = True,
    compat: Literal["none", "official"] = "none",
) -> tuple[Recipe, ...]:
    """Learn a module.

    kind: whether it is a content or a style module (set by the command). rank: of the module; must be even. steps:
    optimiser steps. lr: AdamW's learning rate for the module's own factor. partner_lr: AdamW's learning rate for the
    partners' factor. partner_count: partner pictures per step; 0 for none. split: the share of rows and columns that is
    frozen. halves: `heads` freezes some rows of every attention head, `first` the first rows, as published. interaction:
    whether modules get a common block, in which fine-tuning can fuse them. orthogonal: whether the frozen halves are
    orthonormal; if not, they are correlated, as in the published code. compat: `official` lets every loss train both
    factors, in turn, with the published clipping and weight decay.
    """
    del blocks
    own: Part = OWN[kind]
    other: Part = "up" if own == "down" else "down"
    isolated = compat == "none"
    everything: frozenset[Part] = frozenset((own, other))

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        del rng
        cut = Cut(rank, split, halves, interaction, orthogonal)
        adapters.add("module", {name: cut.fresh(layer) for name, layer in adapters.layers.items()})

    def active(part: Part) -> tuple[Active, ...]:
        return (Active("module", trains=frozenset({part}) if isolated else everything),)

    branches = [Branch("own", "both", active(own))]
    branches += [
        Branch(f"partner{i + 1}", "both", active(other), weight=1 / partner_count) for i in range(partner_count)
    ]
    rates: dict[tuple[str, Part], Rate] = {("module", own): Rate(lr)}
    if partner_count:
        rates["module", other] = Rate(partner_lr)
    # no clipping: with a common norm, the partners' loss would scale the module's gradient
    optimization, hooks = Optimization(clip=None), Hooks(after_step=partial(_discard_after_last, steps, other))
    recipe = Recipe(prepare, lambda step: tuple(branches), rates, steps, PASSES, optimization, hooks)
    return (recipe if isolated else official(recipe, own),)


def make(
    blocks: Blocks,
    *,
    roles: tuple[str, ...] = ("content", "style"),
    rank: int = 64,
    split: float = 0.5,
    halves: Halves = "heads",
    interaction: bool = False,
    orthogonal: bool = True,
    fine_tune: int = 300,
    metric: Literal["riemannian", "euclidean"] = "riemannian",
    lr: float = 1e-4,
    delta: float = 1e-2,
    every: int = 25,
    patience: int = 4,
    compat: Literal["none", "official"] = "none",
) -> tuple[Recipe, ...]:
    """Combine a content module and a style module by fine-tuning.

    roles, rank, split, halves, interaction, orthogonal: those of the modules (set by the command). fine_tune: training
    steps on both pictures, each under its own prompt. metric: `riemannian` measures steps by the change of ΔW, `euclidean`
    by that of each factor, as AdamW does. lr: learning rate; with `euclidean` for entries of a factor, with `riemannian` for entries of
    ΔW. delta: damping, relative to the size of the factors. every: steps between checks of the validation loss (both
    pictures under the joint prompt). patience: training stops after this many checks without a lower loss. compat:
    `official` initialises the content factor and the frozen halves of queries, and of square keys and values, again before
    training, as the published code does.
    """
    del blocks
    parts: tuple[Part, ...] = ("down", "up")
    active = (Active("merged"),)
    branches = tuple(Branch(role, role, active) for role in roles)

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        cut, made, styles = Cut(rank, split, halves, interaction, orthogonal), {}, adapters.folded("style")
        for name, content in adapters.folded("content").items():
            made[name] = cut.opened(adapters.layers[name], cut.joined(content, styles[name], name))
            if compat == "official" and is_redrawn(name, made[name]):
                redraw(made[name], rng)
        adapters.add("merged", made)

    stop = Stop(tuple(Branch(role, "both", active) for role in roles), every, patience)
    rates: Rates = {("merged", part): Rate(lr) for part in parts}
    optimization = Optimization(adamw)
    if metric == "riemannian":
        # clipping would make the step depend on how ΔW is factored
        optimization = Optimization(partial(riemannian, delta=delta), clip=None)
    return (Recipe(prepare, lambda step: branches, rates, fine_tune, PASSES, optimization, stop=stop),)


class Cut:
    """How a LoRA is divided into blocks. Modules can only be combined if theirs is the same. Raises UsageError for an odd
    rank or a split outside 0..1."""

    def __init__(self, rank: int, split: float, halves: Halves, interaction: bool, orthogonal: bool) -> None:
        if rank < 2 or rank % 2:
            raise UsageError(f"rank {rank} cannot be halved", "rank", "Give an even rank.")
        if not 0 < split < 1:
            fix = "It is the share that is frozen: give a number between 0 and 1."
            raise UsageError(f"a split of {split} is impossible", "split", fix)
        self.rank, self.split, self.halves = rank, split, halves
        self.interaction, self.orthogonal = interaction, orthogonal

    def fixed(self, layer: AdaptedLinear) -> Fixed:
        """The frozen part of one layer (P and Q), and masks of what is trained."""
        d, k = layer.base.weight.shape
        half, where = self.rank // 2, home(layer.base)
        frozen_rows, frozen_columns = self.frozen(d), self.frozen(k)
        up, down = torch.zeros(d, self.rank), torch.zeros(self.rank, k)
        if self.orthogonal:
            up[frozen_rows, :half] = basis(int(frozen_rows.sum()), half, 0).T
            down[half:, frozen_columns] = basis(int(frozen_columns.sum()), half, 0)
        else:  # rows of a column-orthonormal matrix, in every rank: as correlated as noise
            up[frozen_rows] = basis(d, self.rank, 0).T[frozen_rows]
            down[:, frozen_columns] = basis(k, self.rank, 1)[:, frozen_columns]
        ranks = torch.ones(self.rank)
        first = (torch.arange(self.rank) < half).float()
        free = (ranks, ranks) if self.interaction or not self.orthogonal else (first, 1 - first)
        values = {"down": down, "up": up, "down_ranks": free[0], "up_ranks": free[1]}
        values |= {"columns": (~frozen_columns).float(), "rows": (~frozen_rows).float()}
        return Fixed(**{name: value.to(where) for name, value in values.items()})

    def fresh(self, layer: AdaptedLinear) -> Factors:
        """The factors of one layer before training. With orthonormal halves, ΔW = 0, and all trained entries have
        gradients."""
        d, k = layer.base.weight.shape
        factors = Factors(torch.zeros(self.rank, k), torch.zeros(d, self.rank))
        factors.fixed = self.fixed(layer)
        return factors

    def joined(self, content: Lora, style: Lora, name: str) -> Lora:
        """The content's down with the style's up. Raises UsageError if the frozen halves differ. `name`: the layer."""
        outputs, inputs = self.frozen(len(style.up)), self.frozen(content.down.shape[1])
        same = content.down.shape == style.down.shape and content.up.shape == style.up.shape
        same = same and _proportional(content.down[:, inputs], style.down[:, inputs])
        if not same or not _proportional(content.up[outputs], style.up[outputs]):
            what = "the modules do not share their frozen halves"
            raise UsageError(what, name, "Break both on one base, with the same rank, split and halves.")
        down = torch.where(inputs, style.down, content.down)
        return Lora(down, style.up * (style.alpha * content.alpha / self.rank**2), float(self.rank))

    def opened(self, layer: AdaptedLinear, lora: Lora) -> Factors:
        """The factors of a joined module, for training. What is frozen keeps its values from the files."""
        device = home(layer.base)
        made = Factors(lora.down.to(device, copy=True), lora.up.to(device, copy=True))
        made.fixed = self.fixed(layer)
        free_down, free_up = made.fixed.free(made.down.detach(), made.up.detach())
        made.fixed.down, made.fixed.up = made.down.detach() - free_down, made.up.detach() - free_up
        return made

    def frozen(self, size: int) -> Tensor:
        """Which of `size` rows or columns are frozen, a boolean tensor `[size]`. They are spread evenly, so that every
        attention head keeps some that are trained, or they are the first ones."""
        place = torch.arange(size)
        if self.halves == "first":
            return place < round(size * self.split)
        return torch.floor((place + 1) * self.split) > torch.floor(place * self.split)


def _proportional(first: Tensor, second: Tensor) -> bool:
    """Whether tensors are equal up to a factor: weight decay as published shrinks frozen halves, each at its own rate."""
    factor = (first * second).sum() / second.square().sum().clamp_min(1e-30)
    similar = bool(factor > 0.5) and torch.allclose(first, factor * second, rtol=1e-3, atol=1e-6)
    return similar or torch.equal(first, second)


def _discard_after_last(steps: int, other: Part, adapters: Adapters, step: int) -> None:
    """After the last step, discard the factor that the partners trained."""
    if step + 1 < steps:
        return
    with torch.no_grad():
        for factors in adapters.of("module").values():
            getattr(factors, other).zero_()


MODULE = Inputs(
    (Input("own", "pictures"), Input("partner", "pictures", optional=True)),
    set_by_verb=("kind",),
    shortest={"lr": 1e-1, "partner_count": 1},
)
TWO_MODULES = Inputs(two("module"), set_by_verb=("roles", *CUT, "fine_tune"), shortest={"lr": 1e-4, "fine_tune": 2})
PAPER = "doi 10.1145/3728461"
BREAK = (Publication("Break-for-Make: a module", PAPER), MODULE)
MAKE = (Publication("Break-for-Make: fine-tuning", PAPER), TWO_MODULES)
ENTRIES = (
    Entry(
        "break",
        "break",
        with_x0_loss(break_),
        {"both": "{prompt}"},
        lambda settings: {"module": Output(("module",), "both")},
        *BREAK,
    ),
    Entry("make", "make", with_x0_loss(make), {}, lambda settings: {"merged": Output(("merged",), "both")}, *MAKE),
)
