"""B-LoRA: one image → a content LoRA and a style LoRA in different layers (arXiv 2403.14572).

One LoRA is trained on two attention groups under a prompt that names neither subject nor style. In SDXL the first group
controls the content of a picture and the second its style. So the LoRA is divided into two that change different layers
and cannot interfere.
"""

from dataclasses import replace

import torch

from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch, Part
from unbraid.core.optim import Rate
from unbraid.core.recipe import Recipe
from unbraid.methods.entry import ONE_PICTURE, ROLES, Blocks, Entry, Output, Publication, alone, known_blocks
from unbraid.methods.losses import with_x0_loss


def blora(
    blocks: Blocks, *, rank: int = 64, steps: int = 1000, lr: float = 5e-5, weight_decay: float = 1e-4
) -> tuple[Recipe, ...]:
    """Split one image by blocks.

    rank: of each LoRA. steps: optimiser steps. lr: AdamW's learning rate. weight_decay: AdamW's.
    """
    known_blocks(blocks, "blora")

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        for role in ROLES:
            adapters.new(role, rank, rng, within=alone(blocks, role))

    both = Branch("image", "both", tuple(Active(role) for role in ROLES))
    parts: tuple[Part, ...] = ("down", "up")
    rates: dict[tuple[str, Part], Rate] = {(role, part): Rate(lr, weight_decay) for role in ROLES for part in parts}
    return (Recipe(prepare, lambda step: (both,), rates, steps),)


ENTRIES = (
    Entry(
        "blora",
        "split",
        with_x0_loss(blora),
        {"both": "a {rare}"},
        lambda settings: {role: Output((role,), "both") for role in ROLES},
        Publication("B-LoRA", "arXiv 2403.14572"),
        replace(ONE_PICTURE, reads_blocks=True),
    ),
)
