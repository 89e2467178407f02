"""NP-LoRA: removes from the content LoRA what it does to the inputs that the style LoRA reads (arXiv 2511.11051). Nothing
is trained."""

import torch

from unbraid.core.adapters import Adapters
from unbraid.core.lowrank import outside
from unbraid.core.recipe import Recipe
from unbraid.methods.entry import TWO_LORAS, Blocks, Entry, Publication, zip_outputs


def nplora(
    blocks: Blocks, *, roles: tuple[str, ...] = ("content", "style"), mu: float = 0.5, single: bool = False
) -> tuple[Recipe, ...]:
    """Combine LoRAs without training; `merge --method np-lora` does the same on files alone.

    roles: the LoRAs' names (set by the command). mu: how much is removed: 0 is nothing, a large number everything. single:
    write one file, with the sum of the ranks, in place of one per LoRA.
    """
    del blocks, single

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        del rng
        styles = adapters.of("style")
        for name, factors in (
            (name, one) for role in roles if role != "style" for name, one in adapters.of(role).items()
        ):
            if name in styles:
                with torch.no_grad():
                    factors.down.copy_(outside(factors.down, styles[name].down, mu))

    return (Recipe(prepare, lambda step: (), {}, 0),)


ENTRIES = (Entry("np-lora", "zip", nplora, {}, zip_outputs, Publication("NP-LoRA", "arXiv 2511.11051"), TWO_LORAS),)
