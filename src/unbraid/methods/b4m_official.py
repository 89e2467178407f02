"""Break-for-Make as its authors' code behaves (ICTMCG/Break-for-make, commit 7898be7), for comparison. Written from a
description of the code."""

import torch

from unbraid.core.lora import Factors


def redraw(factors: Factors, rng: torch.Generator) -> None:
    """Initialise all of down, and the frozen half of up, again. The published constructor does this to square layers
    after it has loaded them."""
    assert factors.fixed
    rank, k = factors.down.shape
    down = torch.randn(rank, k, generator=rng) / rank
    frozen = torch.linalg.qr(torch.randn(len(factors.up), rank, generator=rng)).Q * (
        1 - factors.fixed.rows[:, None].cpu()
    )
    with torch.no_grad():
        factors.fixed.down, factors.fixed.up = torch.zeros_like(factors.down), frozen.to(factors.up)
        factors.fixed.down_ranks, factors.fixed.columns = torch.ones(rank), torch.ones(k)
        factors.down.copy_(down)
