"""Measures what QR-LoRA's bases cost at SDXL's size: `python -m tools.basis_cost [RANK]` prints a table.

One layer of each shape is computed, with random weights, exactly and by random projection; the times are multiplied by the
number of such layers in SDXL. Times are those of the processor, so that other programs do not disturb them. Random weights
have no strong directions, unlike those of a real base: they are the worst case for the projection.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from unbraid.methods.bases import projected, strongest

SHAPES = {(1280, 1280): 360, (1280, 2048): 120, (640, 640): 60, (640, 2048): 20}  # [d, k] of attention → layers in SDXL


def seconds(function: Callable[[Tensor, int], Tensor], weight: Tensor, rank: int) -> float:
    """The processor's time of one call."""
    begun = time.process_time()
    function(weight, rank)
    return time.process_time() - begun


def main(rank: int) -> None:
    """Print the table."""
    print(
        "| layer | layers | exact, s | projected, s | share of the best approximation's norm² |\n|---|---|---|---|---|"
    )
    totals = [0.0, 0.0]
    for (d, k), count in SHAPES.items():
        weight = torch.randn(d, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        times = [seconds(function, weight, rank) for function in (strongest, projected)]
        best, mine = (float((function(weight, rank).T @ weight).square().sum()) for function in (strongest, projected))
        totals = [total + count * one for total, one in zip(totals, times, strict=True)]
        print(f"| {d}×{k} | {count} | {times[0]:.3f} | {times[1]:.3f} | {mine / best:.4f} |", flush=True)
    print(f"| all | {sum(SHAPES.values())} | {totals[0]:.0f} | {totals[1]:.0f} | |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
