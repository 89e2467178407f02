"""ConsisLoRA: one image → a content LoRA and a style LoRA in the layers of B-LoRA, with the x0 loss (arXiv 2503.10614).

First a content adapter and a draft of the style are trained together, as in B-LoRA: with the usual loss, then with the x0
loss (unbraid.methods.losses). Then the draft is thrown away. The content adapter is frozen, and a fresh style adapter is
trained beside it under a prompt of the style, so that it learns only what the content adapter has not. While it trains, the
noise has an offset. The paper's guidance for drawing is `unbraid.sampling.sample.difference`.
"""

from dataclasses import replace
from math import ceil

import torch

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch, Noise, Part
from unbraid.core.optim import Rate
from unbraid.core.recipe import Optimization, Recipe
from unbraid.methods.entry import ONE_PICTURE, Blocks, Entry, Output, Publication, alone, known_blocks

ADAPTERS = {"content": "content", "draft": "style", "style": "style"}  # adapter → the role whose layers it has
FROZEN: frozenset[Part] = frozenset()


def consislora(
    blocks: Blocks,
    *,
    rank: int = 64,
    steps: int = 1500,
    x0_from: int = 500,
    style_steps: int = 1000,
    lr: float = 2e-4,
    x0_lr: float = 1e-4,
    weight_decay: float = 1e-4,
    noise_offset: float = 0.03,
) -> tuple[Recipe, ...]:
    """Split one image by blocks, the content first.

    rank: of each LoRA. steps: optimiser steps of the content adapter. x0_from: the step from which on the loss is that of
    the clean picture; before it, the loss is that of the prediction; by default after a third of the steps or earlier.
    style_steps: further steps, which train the style adapter beside the finished content adapter; by default at most two
    thirds of `steps`. lr: AdamW's learning rate before `x0_from`. x0_lr: AdamW's learning rate
    after it. weight_decay: AdamW's. noise_offset: while the style trains, this times one normal number per channel is added
    to the noise at all positions, so that the mean colour has to be learnt, too; 0 for none.
    """
    known_blocks(blocks, "consislora")
    if not lr:
        raise UsageError("at a learning rate of 0 nothing is trained", "setting lr", "For example 0.0002.")

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        for name, role in ADAPTERS.items():
            adapters.new(name, rank, rng, within=alone(blocks, role))

    first = Branch("image", "both", (Active("content"), Active("draft")))
    beside = (Active("content", trains=FROZEN), Active("style"))
    style = Branch("image", "style", beside, loss="x0", noise=Noise(noise_offset))

    def branches(step: int) -> tuple[Branch, ...]:
        if step >= steps:
            return (style,)
        return (first if step < x0_from else replace(first, loss="x0"),)

    parts: tuple[Part, ...] = ("down", "up")
    rates: dict[tuple[str, Part], Rate] = {(name, part): Rate(lr, weight_decay) for name in ADAPTERS for part in parts}
    slower = x0_lr / lr
    optimization = Optimization(rate_factor=lambda step: 1.0 if step < min(x0_from, steps) else slower)
    return (Recipe(prepare, branches, rates, steps + style_steps, optimization=optimization),)


LIMITS = {
    "x0_from": lambda settings: settings["steps"] // 3,
    "style_steps": lambda settings: ceil(settings["steps"] * 2 / 3),
}
ENTRIES = (
    Entry(
        "consislora",
        "split",
        consislora,
        {"both": "a {rare}", "style": "an image in {style} style"},
        lambda settings: {"content": Output(("content",), "both"), "style": Output(("style",), "style")},
        Publication("ConsisLoRA", "arXiv 2503.10614"),
        replace(
            ONE_PICTURE, shortest={"x0_from": 1, "style_steps": 2, "x0_lr": 3e-2}, limits=LIMITS, reads_blocks=True
        ),
        version=2,  # 2: noise_offset
    ),
)
