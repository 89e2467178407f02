"""The methods that `tools.speed` measures: the published recipe and ours, the adapters, and what the published step
contains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tools.speed.published import Form, dense_product, dense_sum, factorised
from unbraid.bases.families import BLOCKS
from unbraid.core.adapters import Adapters
from unbraid.core.lora import ALL, Factors, Part
from unbraid.core.recipe import Recipe
from unbraid.methods.b4m import break_
from unbraid.methods.dreambooth import dreambooth
from unbraid.methods.pair import pair
from unbraid.methods.unziplora import unziplora
from unbraid.methods.ziplora import ziplora

Make = Callable[[int, int], Recipe]  # rank, steps → recipe
SDXL = BLOCKS["sdxl"]


@dataclass(frozen=True)
class Case:
    """One method. `form`: how the published code computes an adapter's output. `checkpointing`: whether the published recipe
    uses gradient checkpointing. `parts`: the parts of adapters that get gradients in our step. `steps`: length of a run, as
    published."""

    published: Make
    ours: Make
    form: Form
    checkpointing: bool
    adapters: tuple[str, ...]
    parts: frozenset[Part]
    steps: int
    side: int = 1024  # pixels, as published


def _one(recipes: tuple[Recipe, ...]) -> Recipe:
    (recipe,) = recipes
    return recipe


BOTH: frozenset[Part] = frozenset({"down", "up"})
CASES: Mapping[str, Case] = {
    "split": Case(
        lambda rank, steps: _one(unziplora(SDXL, rank=rank, steps=steps, compat="official")),
        lambda rank, steps: _one(unziplora(SDXL, rank=rank, steps=steps, window=max(1, min(16, steps // 36)))),
        dense_product,
        False,
        ("content", "style"),
        ALL,
        600,
    ),
    "zip": Case(
        lambda rank, steps: _one(ziplora(SDXL, granularity="column", steps=steps)),
        lambda rank, steps: _one(ziplora(SDXL, granularity="column", steps=steps)),
        dense_sum,
        True,
        ("content", "style"),
        frozenset({"merger"}),
        100,
    ),
    "pair": Case(
        lambda rank, steps: _one(pair(SDXL, rank=rank, steps=steps, style_from=steps // 3, compat="official")),
        lambda rank, steps: _one(pair(SDXL, rank=rank, steps=steps, style_from=steps // 3)),
        factorised,
        False,
        ("content", "style"),
        frozenset({"up"}),
        750,
        side=512,
    ),
    "break": Case(
        lambda rank, steps: _one(break_(SDXL, rank=rank, steps=steps, compat="official")),
        lambda rank, steps: _one(break_(SDXL, rank=rank, steps=steps)),
        factorised,
        False,
        ("module",),
        BOTH,
        1500,
    ),
    "learn": Case(
        lambda rank, steps: _one(dreambooth(SDXL, rank=rank, steps=steps)),
        lambda rank, steps: _one(dreambooth(SDXL, rank=rank, steps=steps)),
        factorised,
        True,
        ("lora",),
        BOTH,
        1000,
    ),
}


def random_adapters(case: Case, adapters: Adapters, rank: int, mergers: bool) -> None:
    """Add adapters with random factors to every layer and, if wanted, the mergers of the method. This does not use
    `Adapters.add`, which moves factors to a device, because that fails on fake tensors."""
    for i, name in enumerate(case.adapters):
        rng = torch.Generator().manual_seed(i)
        for layer in adapters.layers.values():
            d, k = layer.base.weight.shape
            factors = Factors(*(torch.randn(*s, generator=rng) / s[1] ** 0.5 for s in ((rank, k), (d, rank))))
            if mergers and case.form is dense_product:
                factors.channels = nn.Parameter(torch.ones(d))
            if mergers and case.form is dense_sum:
                factors.columns = nn.Parameter(torch.ones(k))
            layer.adapters[name] = factors
        adapters.names.append(name)


def train_only(case: Case, adapters: Adapters, parts: frozenset[Part]) -> None:
    """Let only these parts of the case's adapters get gradients."""
    for name in case.adapters:
        for factors in adapters.of(name).values():
            for part, parameter in factors.parts():
                parameter.requires_grad_(part in parts)
