"""Orthonormal bases of the strongest outputs of a layer (QR-LoRA, arXiv 2507.04599), computed once per base and rank."""

from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LARGE = 512  # from this width on, the basis is computed by random projection: docs/qrlora.md has the times
SPARE, ROUNDS, SEED = 16, 5, 0  # further directions, rounds of the power iteration, and the seed of the projection
_known = WeakTensorKeyDictionary()  # weight → {(rank, version of the weight): Q}, as long as the base is loaded


def basis(weight: Tensor, rank: int) -> Tensor:
    """Q of the QR decomposition of the best approximation of W with this rank: `[d, rank]`, orthonormal, in single
    precision or better, on the device of `weight`. Its signs are chosen so that the diagonal of R is positive.

    It depends on W and the rank alone, and is computed once for each weight of a loaded base."""
    if weight.is_meta:  # of the memory estimate
        return weight.new_empty(len(weight), rank)
    made = cast(dict[tuple[int, int], Tensor], _known.setdefault(weight, {}))
    key = (rank, weight._version)
    if key not in made:
        wide = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
        exact = wide.cpu().double()
        u = strongest(exact, rank) if min(exact.shape) < max(LARGE, 4 * rank) else projected(exact, rank)
        q, r = torch.linalg.qr(u @ (u.T @ exact[:, :rank]))
        made[key] = (q * r.diagonal().sign()).to(wide)
    return made[key]


def strongest(weight: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of W, `[d, rank]`. They come from an eigendecomposition of W Wᵀ, which is faster than
    an SVD of W."""
    return torch.linalg.eigh(weight @ weight.T).eigenvectors[:, -rank:]


def projected(weight: Tensor, rank: int) -> Tensor:
    """Like `strongest`, by random projection and power iteration (arXiv 0909.4061), all but the last round in single
    precision. The random numbers are always the same."""
    rng = torch.Generator().manual_seed(SEED)
    rough = weight.float()
    q = torch.linalg.qr(rough @ torch.randn(rough.shape[1], rank + SPARE, generator=rng)).Q
    for _ in range(ROUNDS - 1):
        q = torch.linalg.qr(rough @ (rough.T @ q)).Q
    q = torch.linalg.qr(weight @ (weight.T @ q.to(weight))).Q
    small = q.T @ weight
    return q @ strongest(small, rank)
