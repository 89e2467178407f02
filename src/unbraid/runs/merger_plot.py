"""A plot of the merger coefficients of a zip run: over steps, their distribution, and their mean per block."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.common.atomic import atomic
from unbraid.files.formats.blocks import block_of

COLOURS = ("#1f4e9c", "#c0392b", "#2e8b57", "#8e5ea2")


def mergers_plot(events: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[str, Tensor]], path: Path) -> Path:
    """Write the plot to `path`, and return it.

    `events`: one per step, with `mean NAME` and `cos`. `found`: LoRA → module name in its file → coefficients."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.4), dpi=120, layout="constrained")
    course, spread, where = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    course.plot([event.get("cos", float("nan")) for event in events], color="#888888", label="|cos|")
    blocks: dict[str, None] = {}
    for layers in found.values():
        blocks |= dict.fromkeys(block_of(layer) for layer in layers)
    for colour, (name, layers) in zip(COLOURS * len(found), found.items(), strict=False):
        course.plot([event.get(f"mean {name}", float("nan")) for event in events], color=colour, label=f"mean {name}")
        if not layers:
            continue
        spread.hist(torch.cat(list(layers.values())).float().numpy(), 80, color=colour, alpha=0.6, label=name)
        means = [
            [float(value.mean()) for layer, value in layers.items() if block_of(layer) == block] for block in blocks
        ]
        heights = [sum(some) / len(some) if some else 1.0 for some in means]
        where.plot(list(blocks), heights, "o-", color=colour, label=name)
    course.set(xlabel="step", title="over steps")
    spread.set(xlabel="coefficient", yscale="log", title="distribution")
    where.set(title="mean per block")
    where.tick_params(axis="x", rotation=60)
    for axes in (course, spread, where):
        axes.legend(frameon=False)
    with atomic(path) as part:
        figure.savefig(part)
    return path
