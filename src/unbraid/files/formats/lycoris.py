"""LoHa, LoKr, full changes and DoRA (arXiv 2309.14859, 2402.09353): one module's tensors → factors, or the dense change.

    LoHa   ΔW = α/r (A₁B₁) ⊙ (A₂B₂)     = α/r (A₁ • A₂)(B₁ ∗ B₂)   rank ≤ r²: • row by row, ∗ column by column
    LoKr   ΔW = α/r  W₁ ⊗ W₂                                        its SVD is made of those of W₁ and W₂
    DoRA   ΔW = m (W + ΔV) / ‖W + ΔV‖ − W                           needs W; the norm per output, or per input
Small tensors are computed in fp64, dense matrices in fp32. A convolution is [d, k, kh, kw].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import from_dense, truncate, wide
from unbraid.files.formats.kinds import KIND, VECTORS
from unbraid.files.formats.patterns import alpha_of as peft_alpha

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Alpha:
    """A module's alpha (None: equal to its rank). `whole`: the scale of a LoKr module whose factors are both stored
    as full matrices, so that it has no rank."""

    value: float | None = None
    whole: float = 1.0


LIMIT = 256  # highest rank of a converted module, so that LoHa up to r = 16 is exact


def sorted_out(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parts that change the weight, flattened parts that change bias and norm). A norm's `diff` is renamed to w_norm."""
    named = {"w_norm" if part == "diff" and tensor.ndim == 1 else part: tensor for part, tensor in parts.items()}
    vectors = {part: tensor.flatten() for part, tensor in named.items() if part in VECTORS}
    return {part: tensor for part, tensor in named.items() if part not in VECTORS}, vectors


def alpha_of(settings: Mapping[str, Any], alpha: float | None, module: str) -> Alpha:
    """The file's alpha, or else that of PEFT's LoHaConfig or LoKrConfig, which scale by alpha / r even if LoKr's factors are not
    decomposed."""
    if alpha is not None or not isinstance(settings.get("alpha"), int | float):
        return Alpha(alpha)
    found = peft_alpha({**settings, "lora_alpha": settings["alpha"]}, module, 1)
    ranks = {
        **settings,
        "lora_alpha": settings.get("r"),
        "alpha_pattern": settings.get("rank_pattern"),
        "use_rslora": False,
    }
    rank = peft_alpha(ranks, module, 0)
    return Alpha(found, found / rank if rank else 1.0)


def is_kind(parts: Parts) -> bool:
    """Whether the parts are LoHa, LoKr or a full change."""
    return any(KIND.get(part) in ("LoHa", "LoKr", "full changes") for part in parts)


def low_rank(parts: Parts, alpha: Alpha, kernel: tuple[int, ...], limit: int, where: str) -> tuple[Lora, float]:
    """The change as factors of rank `limit` at most, in fp32 with alpha = r; and the relative error ‖ΔW − BA‖ / ‖ΔW‖ (0: exact).

    `kernel`: (3, 3) if a convolution's kernel is flattened in the file."""
    with _fits(where, parts):
        if "diff" in parts:
            found = _dense_svd(parts["diff"], limit)
        elif "hada_w1_a" in parts:
            found = _loha(parts, alpha, kernel, limit)
        else:
            found = _lokr_svd(parts, alpha, kernel, limit)
    return found


def dense(parts: Parts, alpha: Alpha, shape: tuple[int, ...], where: str) -> Tensor:
    """The dense change, in fp32 and in the weight's `shape`."""
    with _fits(where, parts):
        if "diff" in parts:
            change = wide(parts["diff"])
        elif "hada_w1_a" in parts:
            (left, right), (left2, right2) = _halves(parts)
            change = (left @ right).mul_(left2 @ right2) * _scale(alpha, left.shape[1])
        else:
            first, second, rank = _kron_parts(parts)
            change = torch.kron(first, second) * _scale(alpha, rank)
        return change.float().reshape(shape)


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor, where: str) -> Tensor:
    """DoRA's change of a weight `[d, k, …]` in fp32: magnitude · (W + change) / ‖W + change‖ − W. A magnitude `[d]` or `[d, 1, …]`
    is per output (the paper's and PEFT's), `[1, k, …]` per input (older LyCORIS)."""
    moved = weight + change
    by_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.numel() == weight.shape[1] != 1
    if magnitude.numel() != weight.shape[1 if by_input else 0]:
        what = f"DoRA's magnitude {tuple(magnitude.shape)} does not fit a weight {tuple(weight.shape)}"
        raise UsageError(what, where, "Give the checkpoint that it was trained on.")
    axis = 1 if by_input else 0
    shape = [1] * weight.ndim
    shape[axis] = -1
    norm = torch.linalg.vector_norm(moved, dim=[i for i in range(weight.ndim) if i != axis], keepdim=True)
    return moved.mul_(wide(magnitude).reshape(shape) / norm.clamp_min(torch.finfo(norm.dtype).tiny)).sub_(weight)


def factored(change: Tensor, limit: int) -> tuple[Lora, float]:
    """A dense change `[d, k, …]` as factors of rank `limit` at most, and the relative error."""
    return _dense_svd(change, limit)


def kernel_of(module: str, family: str) -> tuple[int, ...]:
    """The kernel of a module, for files that flatten it; () for a linear layer. Only Stable Diffusion's UNets have convolutions."""
    leaf = module.rpartition(".")[2]
    if not module.startswith("unet."):
        return ()
    if leaf in ("conv", "conv1", "conv2", "conv_in", "conv_out"):
        return (3, 3)
    return (1, 1) if leaf == "conv_shortcut" or (family == "sd15" and leaf in ("proj_in", "proj_out")) else ()


class _fits:
    """Checks a module's parts, and raises UsageError for errors from missing parts or shapes that do not fit."""

    def __init__(self, where: str, parts: Parts) -> None:
        self.where, self.parts = where, parts

    def __enter__(self) -> None:
        kinds = {KIND.get(part, "LoRA") for part in self.parts}
        if len(kinds) > 1:
            raise UsageError(f"two kinds of change, {' and '.join(sorted(kinds))}", self.where, "The file is damaged.")
        if any(not tensor.numel() for tensor in self.parts.values()):
            raise UsageError("a tensor is empty", self.where, "The file is damaged.")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KeyError):
            raise UsageError(f"{error.args[0]} is missing", self.where, "The file is incomplete.") from error
        if isinstance(error, RuntimeError | IndexError | ValueError):
            raise UsageError("shapes do not fit each other", self.where, "The file is damaged.") from error


def _scale(alpha: Alpha, rank: int) -> float:
    if not rank:
        return alpha.whole
    return 1.0 if alpha.value is None else alpha.value / rank


def _halves(parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """LoHa's two products as (left `[d, r]`, right `[r, k·kh·kw]`). With a core t `[r, r, kh, kw]` (Tucker) the left factor is
    `[r, d]`, the right one is t times b."""
    out = []
    for i in "12":
        left, right = parts[f"hada_w{i}_a"].double(), parts[f"hada_w{i}_b"].double()
        if f"hada_t{i}" in parts:
            core = parts[f"hada_t{i}"].double()
            right = torch.einsum("ij...,jk->ik...", core, right)
            left = left.T
        out.append((left, right.flatten(1)))
    return out


def _loha(parts: Parts, alpha: Alpha, kernel: tuple[int, ...], limit: int) -> tuple[Lora, float]:
    (left, right), (left2, right2) = _halves(parts)
    scale = _scale(alpha, left.shape[1])
    kernel = _kernel(parts.get("hada_t1"), kernel)
    rank = left.shape[1] * left2.shape[1]
    if rank > limit and rank >= min(len(left), right.shape[1]):  # the exact factors would be larger than the change
        return _dense_svd(((left @ right) * (left2 @ right2) * scale).float(), limit, kernel)
    up = torch.einsum("di,dj->dij", left, left2).flatten(1) * scale
    down = torch.einsum("ik,jk->ijk", right, right2).flatten(0, 1)
    if rank <= limit:
        return _shaped(down, up, kernel), 0.0
    lora, kept = truncate(Lora(down, up, float(rank)), limit)
    return _shaped(lora.down, lora.up, kernel), max(1 - kept, 0.0) ** 0.5


def _kron_parts(parts: Parts) -> tuple[Tensor, Tensor, int]:
    """W₁ `[l, m]`, W₂ `[n, p·kh·kw]`, and the rank that alpha is divided by (0: neither is decomposed, and alpha is not used)."""
    rank = 0
    if "lokr_w2" in parts:
        second = parts["lokr_w2"].double().flatten(1)
    elif "lokr_t2" in parts:
        core, left, right = (parts[f"lokr_{part}"].double() for part in ("t2", "w2_a", "w2_b"))
        second, rank = torch.einsum("ij...,ip,jr->pr...", core, left, right).flatten(1), len(left)
    else:
        left, right = parts["lokr_w2_a"].double(), parts["lokr_w2_b"].double()
        second, rank = left @ right.flatten(1), left.shape[1]
    if "lokr_w1" in parts:
        return parts["lokr_w1"].double(), second, rank
    left, right = parts["lokr_w1_a"].double(), parts["lokr_w1_b"].double()
    return left @ right, second, left.shape[1]


def _lokr_svd(parts: Parts, alpha: Alpha, kernel: tuple[int, ...], limit: int) -> tuple[Lora, float]:
    """The best factors of W₁ ⊗ W₂. Its singular values are all products of those of W₁ and W₂, its singular vectors the Kronecker products."""
    first, second, rank = _kron_parts(parts)
    whole = parts.get("lokr_t2", parts.get("lokr_w2"))
    kernel = _kernel(whole, kernel)
    (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(one, full_matrices=False) for one in (first, second))
    values = torch.outer(s1, s2).flatten()
    order = values.argsort(descending=True)
    floor = torch.finfo(values.dtype).eps * max(first.shape[1] * second.shape[1], 1)
    count = max(min(int((values > values.max() * floor).sum()), limit), 1)
    i, j = order[:count] // len(s2), order[:count] % len(s2)
    up = torch.einsum("ac,bc->abc", u1[:, i], u2[:, j]).flatten(0, 1)
    down = torch.einsum("ca,cb->cab", v1[i], v2[j]).flatten(1)
    root = (values[order[:count]]).sqrt()
    total = float(values.square().sum())
    lost = float(values[order[count:]].square().sum()) / total if total else 0.0
    return _shaped(down * root[:, None], up * root * _scale(alpha, rank), kernel), lost**0.5 if lost > 1e-20 else 0.0


def _dense_svd(change: Tensor, limit: int, kernel: tuple[int, ...] = ()) -> tuple[Lora, float]:
    kernel = _kernel(change, kernel)
    matrix = wide(change.flatten(1))
    like = Lora(matrix.new_empty(1, matrix.shape[1]), matrix.new_empty(len(matrix), 1), 1.0)
    lora, _ = from_dense(matrix, like, limit if limit < min(matrix.shape) else None, None, 0)
    size = float(torch.linalg.vector_norm(matrix))
    error = float(torch.linalg.vector_norm(matrix - lora.up @ lora.down)) / size if size else 0.0
    return _shaped(lora.down, lora.up, kernel), error


def _kernel(whole: Tensor | None, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The size of the kernel: from a tensor of the file if it has one, else the one expected from the module's name."""
    return tuple(whole.shape[2:]) if whole is not None and whole.ndim > 2 else kernel


def _shaped(down: Tensor, up: Tensor, kernel: tuple[int, ...]) -> Lora:
    rank, taps = len(down), prod(kernel)
    if kernel and down.shape[1] % taps == 0:
        down, up = down.reshape(rank, -1, *kernel), up[:, :, None, None]
    return Lora(down.float().contiguous(), up.float().contiguous(), float(rank))
