"""DreamBooth-LoRA (arXiv 2208.12242 with arXiv 2106.09685): images of one thing → one LoRA."""

from unbraid.lora import Active, Branch, Part
from unbraid.methods.unziplora import Blocks
from unbraid.optim import Rate
from unbraid.train import Recipe


def dreambooth(
    blocks: Blocks, *, rank: int = 64, steps: int = 1000, lr: float = 5e-5, weight_decay: float = 1e-4
) -> tuple[Recipe, ...]:
    """Learn one concept or style.

    rank: of the adapter. steps: optimiser steps. lr, weight_decay: of AdamW.
    """
    parts: tuple[Part, ...] = ("down", "up")
    return (
        Recipe(
            lambda adapters, rng: adapters.new("lora", rank, rng),
            lambda step: (Branch("image", "both", (Active("lora"),)),),
            {("lora", part): Rate(lr, weight_decay) for part in parts},
            steps,
        ),
    )
