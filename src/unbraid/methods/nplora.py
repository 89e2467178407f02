"""NP-LoRA: what the content LoRA does to the style's own inputs is taken out of it, and nothing is trained (arXiv 2511.11051)."""

import torch

from unbraid.core.adapters import Adapters
from unbraid.core.lowrank import outside
from unbraid.core.recipe import Recipe
from unbraid.methods.entry import TWO_LORAS, Blocks, Entry, zip_outputs


def nplora(
    blocks: Blocks, *, roles: tuple[str, ...] = ("content", "style"), mu: float = 0.5, single: bool = False
) -> tuple[Recipe, ...]:
    """Put LoRAs together at once; `merge --method np-lora` does the same for files alone.

    roles: the LoRAs' names (set by the command). mu: 0 takes nothing out, a large one everything. single: one file of the
    ranks' sum, not one per LoRA.
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


ENTRIES = (Entry("np-lora", "zip", nplora, {}, zip_outputs, "NP-LoRA", "arXiv 2511.11051", TWO_LORAS),)
