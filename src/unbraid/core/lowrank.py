"""Low-rank algebra on LoRA factors. No d×k matrix is formed except where a function says so.

A convolution is treated as the matrix [d, k·kh·kw] of its flattened kernel.
"""

from math import frexp, isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora

MOST_ENTRIES = 2**27  # of a dense matrix: 0.5 GB. The largest layer of SDXL has 29 million, that of Flux.1 66 million.
DENSE = 1300  # shorter side above which a full SVD takes more than seconds; in SDXL's layers it is at most 1280


def matrices(lora: Lora) -> tuple[Tensor, Tensor]:
    """down `[r, k]` and up `[d, r]` as matrices, in the file's dtype."""
    return lora.down.flatten(1), lora.up.flatten(1)


def shaped(down: Tensor, up: Tensor, alpha: float, like: Lora) -> Lora:
    """A Lora from factors that are matrices, in the form of `like` (linear or convolution)."""
    tail = like.down.shape[1:]
    return Lora(down.reshape(-1, *tail), up.reshape(up.shape[0], -1, *([1, 1] if len(tail) == 3 else [])), alpha)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least fp32, for arithmetic."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def wide_pair(lora: Lora) -> tuple[Tensor, Tensor]:
    """down `[r, k]` and up `[d, r]` as matrices, both in the same dtype, at least fp32."""
    down, up = (wide(part) for part in matrices(lora))
    dtype = torch.promote_types(down.dtype, up.dtype)
    return down.to(dtype), up.to(dtype)


def finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity. Only the minimum and maximum are checked: any NaN or infinity shows in
    them, and this is 60 times faster than isfinite on every entry."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def delta(lora: Lora) -> Float[Tensor, "d k"]:
    """alpha / r · up @ down as a dense matrix, for the methods that are defined by its entries. Raises UsageError if it
    is too large."""
    down, up = wide_pair(lora)
    if len(up) * down.shape[1] > MOST_ENTRIES:
        what = f"a full change of {len(up)}×{down.shape[1]} does not fit into memory"
        raise UsageError(what, "merge", "Use concat, knots or np-lora, which do not form it.")
    return (up @ down).mul_(lora.alpha / len(down))


def norm(lora: Lora) -> float:
    """The Frobenius norm of the change. It is computed from the r×r Gram matrices, ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ), or from BA
    itself if that is smaller."""
    down, up = (part.double() for part in matrices(lora))
    small = len(down) ** 2 <= len(up) * down.shape[1]
    square = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0) if small else (up @ down).square().sum()
    return float(square.sqrt()) * abs(lora.alpha) / len(down)


def outside(down: Float[Tensor, "r k"], protected: Float[Tensor, "q k"], mu: float) -> Float[Tensor, "r k"]:
    """down (I − μ/(1+μ) QQᵀ). The columns of Q span the input directions that `protected` reads (NP-LoRA,
    arXiv 2511.11051)."""
    _, s, vt = torch.linalg.svd(wide(protected), full_matrices=False)
    q = vt[s > s[0] * max(vt.shape) * torch.finfo(s.dtype).eps].T  # QR would add arbitrary directions
    q = q.to(down.dtype)
    return down - mu / (1 + mu) * (down @ q) @ q.T


def svd(lora: Lora) -> tuple[Float[Tensor, "d q"], Float[Tensor, " q"], Float[Tensor, "q k"]]:
    """U, S, Vᵀ of the change, from a QR decomposition of each factor and the SVD of an r×r core (ziplora.md E4).
    q = min(r, d, k)."""
    down, up = wide_pair(lora)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    scale = lora.alpha / len(down)
    return q_up @ u, s * abs(scale), (vt @ q_down.T) * (1 if scale >= 0 else -1)


def truncate(lora: Lora, rank: int | None = None, energy: float | None = None) -> tuple[Lora, float]:
    """The best approximation of rank ≤ `rank`, or the smallest that keeps the share `energy` of ‖ΔW‖².

    Returns the approximation (alpha = r) and the share of ‖ΔW‖² that it keeps. If neither is given, the result is the
    same change at its numerical rank.
    """
    u, s, vt = svd(lora)
    return _kept(u, s, vt, rank, energy, float((s.double() ** 2).sum()), lora)


def from_dense(
    weight: Float[Tensor, "d k"], like: Lora, rank: int | None, energy: float | None, seed: int
) -> tuple[Lora, float]:
    """Factors of a dense change, as in `truncate`. The SVD is a full one if `rank` is None or large relative to
    min(d, k), else it is approximated by subspace iteration with a seed."""
    small = min(weight.shape)
    q = small if rank is None else min(2 * rank + 16, small)
    if q < small:
        basis = _range(weight, q, seed)
        core_u, s, vt = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        u = basis @ core_u
    else:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    total = float(torch.linalg.vector_norm(weight, dim=1).double().square().sum())  # row by row: no fp64 copy
    return _kept(u, s, vt, rank, energy, total, like)


def exact_dense(weight: Tensor, where: str = "") -> Lora:
    """Factors of a dense change that is low-rank except for rounding (as in ziplora-pytorch's files).

    Rounding with precision eps adds noise of spectral norm ≤ eps ‖W‖ (√d + √k) / √(dk). Singular values below that are
    dropped, all others are kept. Raises UsageError for a large matrix that is not of low rank.
    """
    eps = torch.finfo(weight.dtype).eps
    matrix = wide(weight)
    d, k = matrix.shape
    rounding = eps * float(matrix.norm()) * (d**0.5 + k**0.5) / (d * k) ** 0.5
    u, s, vt = _leading(matrix, rounding, where) if min(d, k) > DENSE else torch.linalg.svd(matrix, full_matrices=False)
    floor = max(rounding, 8 * torch.finfo(s.dtype).eps * float(s[0]))  # the SVD's own error
    rank = max(int((s > floor).sum()), 1)
    root = s[:rank].sqrt()
    return Lora((root[:, None] * vt[:rank]).contiguous(), u[:, :rank] * root, float(rank))


def _leading(matrix: Tensor, floor: float, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a large matrix of low rank: 32 leading directions, or 512 if the last of the 32 is above `floor`, the
    noise. Raises UsageError if the last of the 512 is, too."""
    for count in (32, 512):
        basis = _range(matrix, count, 0)
        core, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        if float(s[-1]) <= floor:
            return basis @ core, s, vt
    d, k = matrix.shape
    fix = "It is no LoRA; factorising a full change of this size takes hours."
    raise UsageError(f"a full change of {d}×{k} with a rank above 512", where, fix)


def fold_mid(down: Tensor, mid: Tensor) -> Tensor:
    """LoCon's Tucker form as one factor: down `[r, k, 1, 1]` and mid `[r, r, kh, kw]` → down `[r, k, kh, kw]`."""
    dtype = torch.promote_types(torch.promote_types(mid.dtype, down.dtype), torch.float32)
    return torch.einsum("rshw,sk->rkhw", mid.to(dtype), down.flatten(1).to(dtype)).to(down.dtype)


def times_power_of_two(tensor: Tensor, factor: float) -> Tensor | None:
    """tensor · factor in the tensor's dtype, or None if `factor` is not a power of two or the product is not exact.
    Most strengths and values of alpha / r are powers of two, for which exactness is quick to check."""
    if factor == 1:
        return tensor
    if abs(frexp(factor)[0]) != 0.5 or abs(factor) > 1e30:
        return None
    scaled = tensor * factor
    below = abs(factor) < 1 and not torch.equal(scaled / factor, tensor)  # bits lost in subnormal numbers
    return None if below or not finite(scaled) else scaled


def rescaled(lora: Lora, alpha: float, dtype: torch.dtype | None, where: str) -> Lora:
    """The same change with another alpha, in another dtype.

    `dtype=None` keeps the dtype of each factor, or uses fp32 if scaling it would not be exact. Factors too large or too
    small for the precision of `dtype` are balanced by a power of two; if that does not help, they stay in fp32. Raises
    UsageError for weights that are not finite, or would not be after scaling, or would all become 0.
    """
    down, up, factor = lora.down, lora.up, lora.alpha / alpha
    if not (finite(down) and finite(up) and isfinite(factor)):
        raise UsageError("NaN or infinite weights", where, "The training diverged, or a weight is far too large.")
    quick = times_power_of_two(up, factor)
    if quick is not None:
        up = quick
    elif dtype is not None or abs(frexp(factor)[0]) == 0.5:
        up = wide(up).mul(factor)
    else:
        scaled = up.double() * factor
        exact = torch.equal(scaled.to(up.dtype).double(), scaled)
        up = scaled.to(up.dtype) if exact else scaled.float() if up.dtype != torch.float64 else scaled
    if not finite(up) or (bool(lora.up.any()) and not bool(up.any())):
        effect = "large that weights overflow" if abs(factor) > 1 else "small that all weights become 0"
        raise UsageError(f"the strength is so {effect}", where, "Give another one.")
    if dtype is not None:
        down, up = _cast(down, up, dtype)
    return Lora(down.contiguous(), up.contiguous(), alpha)


def _kept(
    u: Tensor, s: Tensor, vt: Tensor, rank: int | None, energy: float | None, total: float, like: Lora
) -> tuple[Lora, float]:
    squares = s.double() ** 2
    count = int((s > s[0] * torch.finfo(s.dtype).eps).sum()) if len(s) and float(s[0]) else 1
    if energy is not None:
        reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)
        count = min(count, int(reached.int().argmax()) + 1 if bool(reached.any()) else len(s))
    if rank is not None:
        count = min(count, rank)
    count = max(count, 1)
    root = s[:count].sqrt()
    share = float(squares[:count].sum()) / total if total else 1.0
    return shaped(root[:, None] * vt[:count], u[:, :count] * root, float(count), like), min(share, 1.0)


def _range(weight: Tensor, q: int, seed: int) -> Tensor:
    """An orthonormal basis of the leading q left singular directions (Halko et al., arXiv 0909.4061)."""
    rng = torch.Generator().manual_seed(seed)
    basis = weight @ torch.randn(weight.shape[1], q, generator=rng).to(weight)
    for _ in range(4):
        basis = weight @ torch.linalg.qr(weight.T @ torch.linalg.qr(basis)[0])[0]
    return torch.linalg.qr(basis)[0]


def _cast(down: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    for shift in (lambda *both: both, _balanced):
        cast = [_rounded(factor, dtype) for factor in shift(down, up)]
        if cast[0] is not None and cast[1] is not None:
            return cast[0], cast[1]
    return down.float(), up.float()


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The tensor in `dtype`, or None if the cast loses more than rounding does: by overflow, or because too much of the
    tensor lies below the smallest normal number."""
    out = tensor.to(dtype)
    if tensor.dtype == dtype or torch.promote_types(tensor.dtype, dtype) == dtype or not tensor.is_floating_point():
        return out
    if not finite(out):
        return None
    tiny, eps, exact = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps, wide(tensor)
    norm = float(torch.linalg.vector_norm(exact))
    if tiny * tensor.numel() ** 0.5 <= norm:
        return out  # even if every entry lost its subnormal part, the loss would be about eps of the norm
    fits = float((out.to(exact.dtype) - exact).norm()) <= 2 * eps * norm
    return out if fits else None


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Give both factors about the same magnitude. They are scaled by a power of two, so their product stays bit for bit
    the same."""
    sizes = torch.stack([part.abs().max().double() for part in (down, up)])
    if bool((sizes == 0).any()):
        return down, up
    power = 2.0 ** round(float((sizes[1] / sizes[0]).log2()) / 2)
    return down.double() * power, up.double() / power
