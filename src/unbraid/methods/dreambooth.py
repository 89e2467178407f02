"""DreamBooth-LoRA (arXiv 2208.12242 with arXiv 2106.09685): images of one thing → one LoRA."""

from typing import Literal

from unbraid.core.lora import Active, Branch, Part
from unbraid.core.optim import Rate
from unbraid.core.recipe import Recipe
from unbraid.methods.entry import Blocks, Entry, Input, Inputs, Output, Publication
from unbraid.methods.losses import with_x0_loss


def dreambooth(
    blocks: Blocks,
    *,
    rank: int = 64,
    steps: int = 1000,
    lr: float = 5e-5,
    weight_decay: float = 1e-4,
    targets: Literal["attention", "transformers"] = "attention",
    prior_weight: float = 0.0,
    mask: Literal["none", "alpha"] = "none",
) -> tuple[Recipe, ...]:
    """Learn one concept or style.

    rank: of the adapter, unless training goes on from a LoRA. steps: optimiser steps. lr: AdamW's learning rate.
    weight_decay: AdamW's. targets: which layers train: attention's projections, or all linear layers of the transformers.
    prior_weight: weight of the loss on pictures of the class (prior preservation). mask: with `alpha`, the transparent
    parts of a picture do not count in its loss.
    """
    del blocks, mask
    parts: tuple[Part, ...] = ("down", "up")
    branches = [Branch("image", "both", (Active("lora"),))]
    if prior_weight:
        branches.append(Branch("prior", "prior", (Active("lora"),), weight=prior_weight))
    return (
        Recipe(
            lambda adapters, rng: None if "lora" in adapters.names else adapters.new("lora", rank, rng),
            lambda step: tuple(branches),
            {("lora", part): Rate(lr, weight_decay) for part in parts},
            steps,
            targets=targets,
        ),
    )


PICTURES = Inputs((Input("image", "pictures"), Input("prior", "pictures", optional=True)))
ENTRIES = (
    Entry(
        "dreambooth",
        "learn",
        with_x0_loss(dreambooth),
        {"both": "{prompt}", "prior": "{class_prompt}"},
        lambda settings: {"lora": Output(("lora",), "both")},
        Publication("DreamBooth-LoRA", "arXiv 2208.12242"),
        PICTURES,
    ),
)
