"""Double precision, so that rounding cannot hide a difference between two results."""

from dataclasses import replace

import torch

from unbraid.core.adapters import Adapters
from unbraid.core.recipe import Recipe


def in_double(recipe: Recipe) -> Recipe:
    """The same, with adapters in double precision."""

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        recipe.prepare(adapters, rng)
        double(adapters)

    return replace(recipe, prepare=prepare)


def double(adapters: Adapters) -> None:
    for layer in adapters.layers.values():
        layer.adapters.double()
