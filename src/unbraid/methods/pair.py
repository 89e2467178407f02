"""Pair Customization: a before/after pair → a style LoRA, and a content LoRA for the rest (arXiv 2405.01536).

The content adapter learns the picture before. From a given step on, the style adapter learns the picture after, on top of
the content adapter. That loss does not train the content adapter, so the style adapter learns only the difference. `down`
of each adapter is frozen, with orthonormal rows that are orthogonal to those of the other adapter; only `up` trains. So
ΔW_content ΔW_styleᵀ = 0, whatever is learnt.

The differences from the published code, and the reasons, are in docs/pair.md; `compat="official"` keeps its order of
updates.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageChops
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch, Factors, Lora, Part
from unbraid.core.optim import Rate
from unbraid.core.recipe import Optimization, Passes, Recipe
from unbraid.core.swap import home
from unbraid.images.crop import alignment
from unbraid.methods.entry import Blocks, Entry, Input, Inputs, Output, Publication
from unbraid.methods.further import with_prior
from unbraid.methods.losses import with_x0_loss
from unbraid.methods.windows import with_windows

ALIGNED = 0.2  # correlation of edges; below it, two pictures are probably no pair (docs/pair.md)
STYLED, PLAIN = ("after", "styled", "stylised", "stylized"), ("before", "original", "unstyled", "plain")
BASIS_SEED = 123846  # the published one
NOTHING: frozenset[Part] = frozenset()


def pair(
    blocks: Blocks,
    *,
    pairs: int = 1,
    rank: int = 64,
    steps: int = 750,
    style_from: int = 250,
    lr: float = 1e-5,
    weight_decay: float = 1e-4,
    slot: int = 0,
    orthogonal: bool = True,
    joint: bool = True,
    compat: Literal["none", "official"] = "none",
) -> tuple[Recipe, ...]:
    """Learn a style from what it does to a picture.

    pairs: number of pairs (set by the command); each has its own content adapter, and they take turns. rank: of each
    adapter. steps: optimiser steps. style_from: the step at which training of the style adapter begins; by default after
    half of the steps or earlier. lr: AdamW's learning rate. weight_decay: AdamW's. slot: which orthonormal rows this style uses; styles in different slots do not
    interfere. orthogonal: whether the adapters have orthogonal rows; if not, both factors train and nothing separates the
    adapters. joint: whether there is a content adapter; if not, the style adapter learns the picture after alone. compat:
    `official` updates the content adapter before it computes the loss of the style, as published, not both at once.
    """
    del blocks
    if slot < 0:
        raise UsageError(f"there is no slot {slot}", "pair", "Slots count from 0.")
    if not 0 <= style_from < steps:
        what = f"style_from {style_from} leaves none of {steps} steps for the style"
        raise UsageError(what, "pair", f"Give style_from={steps - 1} or less, or leave it out.")
    parts: tuple[Part, ...] = ("up",) if orthogonal else ("down", "up")
    numbers = numbered(pairs)
    contents = [f"content{number}" for number in numbers]

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        for content in contents if joint else ():
            add(adapters, content, 0, rng)
        add(adapters, "style", slot + 1, rng)

    def add(adapters: Adapters, name: str, place: int, rng: torch.Generator) -> None:
        if orthogonal:
            fixed(adapters, name, rank, place)
        else:
            adapters.new(name, rank, rng)

    def branches(step: int) -> tuple[Branch, ...]:
        number = numbers[step % pairs]
        content, trains = f"content{number}", frozenset(parts)
        before = Branch(f"before{number}", "content", (Active(content, trains=trains),))
        under = (Active(content, trains=NOTHING),) if joint else ()
        after = Branch(f"after{number}", "style", (*under, Active("style", trains=trains)))
        learning = (before,) if joint else ()
        return (*learning, after) if step >= style_from or not joint else learning

    rates: dict[tuple[str, Part], Rate] = {
        (name, part): Rate(lr, weight_decay) for name in [*contents, "style"] for part in parts
    }
    passes = Passes(frozenset(("crop", "noise", "timestep")), in_turn=compat == "official")
    # no clipping, as published: with a common norm, each loss would scale the gradient of the other
    return (Recipe(prepare, branches, rates, steps, passes, Optimization(clip=None)),)


def numbered(pairs: int) -> list[str]:
    """The suffixes of the roles of each pair: nothing, then 2, 3, …"""
    return ["" if i == 0 else str(i + 1) for i in range(pairs)]


def fixed(adapters: Adapters, name: str, rank: int, place: int) -> None:
    """Add an adapter whose down is frozen: rows `place`·r to (`place` + 1)·r of an orthonormal basis. All layers of one
    input width share one tensor."""
    bases: dict[int, Tensor] = {}
    made: dict[str, Factors] = {}
    for layer_name, layer in adapters.layers.items():
        d, k = layer.base.weight.shape
        if k not in bases:
            bases[k] = rows(k, rank, place).to(home(layer.base))
        made[layer_name] = Factors(bases[k], bases[k].new_zeros(d, rank))
    adapters.add(name, made)


def rows(width: int, rank: int, place: int) -> Tensor:
    """Orthonormal rows `[rank, width]`; those of different places are orthogonal. They do not depend on the rows that
    follow, so only as many rows as needed are computed. Raises UsageError if `width` is too small."""
    last = (place + 1) * rank
    if not 1 <= last <= width:
        what = f"{last} orthonormal rows are needed, this base has layers of {width}"
        raise UsageError(what, "pair", f"Rank {width // (place + 1)} fits, or a lower slot.")
    rng = torch.Generator().manual_seed(BASIS_SEED)
    gaussian = torch.randn(last, width, generator=rng, dtype=torch.float64)
    return torch.linalg.qr(gaussian.T).Q.T[place * rank :].float().contiguous()


def free_slot(others: Mapping[Path, Mapping[str, Lora]], rank: int, wanted: int | None = None) -> int:
    """The first slot whose rows are orthogonal to those of the other styles, or the slot `wanted`. `others`: file → its
    layers. One layer of each width is checked, because all layers of a width share their rows. Raises UsageError if the
    slot is taken, or none is free."""
    downs = {(path, lora.down.shape[1]): lora.down for path, some in others.items() for lora in some.values()}
    most = min((width for _, width in downs), default=rank) // rank - 1
    if wanted is not None and (taken := [path for path, *_ in _meeting(downs, rank, wanted)]):
        fix = "Take another slot, or leave slot out: a free one is taken then."
        raise UsageError(f"slot {wanted} is claimed already", taken[0], fix)
    free = (slot for slot in range(most) if not any(_meeting(downs, rank, slot)))
    slot = next(free, None) if wanted is None else wanted
    if slot is None:
        what = f"none of the {most} slots of rank {rank} is free beside these styles"
        fix = "Lower rank; styles must be of `pair`, orthogonal, each in a slot of its own."
        raise UsageError(what, ", ".join(map(str, others)), fix)
    return slot


def _meeting(downs: Mapping[tuple[Path, int], Tensor], rank: int, slot: int) -> Iterator[tuple[Path, int]]:
    """The files and widths whose rows are not orthogonal to those of the slot."""
    for (path, width), down in downs.items():  # the tolerance allows for files in half precision
        if (down.float() @ rows(width, rank, slot + 1).T).norm() > 0.01 * down.float().norm():
            yield path, width


def check_pairs(images: Mapping[str, Sequence[Image.Image]], files: Mapping[str, Sequence[Path]]) -> list[str]:
    """Check that before and after can be pairs. Raises UsageError if they cannot; returns warnings if it is unlikely."""
    warnings = []
    for role in (role for role in images if role.startswith("before")):
        other = role.replace("before", "after")
        (before,), (after,), (first,), (second,) = images[role], images[other], files[role], files[other]
        where = f"{first} and {second}"
        if abs(log(before.width * after.height / (before.height * after.width))) > 0.02:
            what = f"a pair of different shapes, {before.width}×{before.height} and {after.width}×{after.height}"
            raise UsageError(what, where, "Crop both to the same part of the picture.")
        if before.size == after.size and ImageChops.difference(before, after).getbbox() is None:
            raise UsageError("the same picture twice", where, "Give the picture before and after.")
        if (found := alignment(before, after)) < ALIGNED:
            warnings.append(
                f"{where} hardly line up (edges correlate by {found:.2f}): a pair is one picture in two styles"
            )
        if any(word in first.stem.lower() for word in STYLED) or any(word in second.stem.lower() for word in PLAIN):
            warnings.append(f"{where}: by their names, before and after are swapped")
    return warnings


def outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """The style LoRA and, for a single pair, the content LoRA. The content adapters of several pairs are not written: each
    has learnt only its own pair."""
    content = {"content": Output(("content",), "content")} if settings["joint"] and settings["pairs"] == 1 else {}
    return {"style": Output(("style",), "style"), **content}


PAIRS = Inputs((Input("before", "pictures"), Input("after", "pictures")), set_by_verb=("pairs",), check=check_pairs)
ENTRIES = (
    Entry(
        "pair",
        "pair",
        with_x0_loss(with_windows(with_prior(("style",))(pair))),
        {
            "both": "a {rare} {subject} in {style} style",
            "content": "a {rare} {subject}",
            "style": "a {rare} {subject} in {style} style",
            "prior": "a {subject}",
        },
        outputs,
        Publication("Pair Customization", "arXiv 2405.01536"),
        replace(PAIRS, shortest={"style_from": 0}, limits={"style_from": lambda settings: settings["steps"] // 2}),
    ),
)
