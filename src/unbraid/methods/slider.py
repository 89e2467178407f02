"""The visual slider of Concept Sliders: one LoRA that draws the picture after at strength 1 and the picture before at
strength -1 (arXiv 2311.12092)."""

import torch

from unbraid.core.adapters import Adapters
from unbraid.core.layers import SELF_ATTENTION
from unbraid.core.lora import Active, Branch, Part
from unbraid.core.optim import Rate
from unbraid.core.recipe import Passes, Recipe
from unbraid.methods.entry import Blocks, Entry, Output, Publication
from unbraid.methods.losses import with_x0_loss
from unbraid.methods.pair import PAIRS, numbered


def slider(
    blocks: Blocks,
    *,
    pairs: int = 1,
    rank: int = 4,
    steps: int = 1000,
    lr: float = 2e-4,
    weight_decay: float = 1e-4,
) -> tuple[Recipe, ...]:
    """Learn a slider from pairs.

    pairs: number of pairs (set by the command); they take turns. rank: of the adapter. steps: optimiser steps. lr: AdamW's learning
    rate. weight_decay: AdamW's.
    """
    del blocks
    parts: tuple[Part, ...] = ("down", "up")
    numbers = numbered(pairs)

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        adapters.new("style", rank, rng)

    def branches(step: int) -> tuple[Branch, ...]:
        number = numbers[step % pairs]
        return (
            Branch(f"after{number}", "content", (Active("style"),)),
            Branch(f"before{number}", "content", (Active("style", scale=-1.0),)),
        )

    rates: dict[tuple[str, Part], Rate] = {("style", part): Rate(lr, weight_decay) for part in parts}
    passes = Passes(shared=frozenset(("crop", "noise", "timestep")))
    return (Recipe(prepare, branches, rates, steps, passes, targets=SELF_ATTENTION),)


ENTRIES = (
    Entry(
        "slider",
        "pair",
        with_x0_loss(slider),
        {"both": "a {rare} {subject}", "content": "a {rare} {subject}"},
        lambda settings: {"style": Output(("style",), "content")},
        Publication("Concept Slider", "arXiv 2311.12092"),
        PAIRS,
    ),
)
