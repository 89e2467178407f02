"""The merging methods. Each merges one module of several LoRAs. Imports no library but torch.

A method takes the module's name, its parts (one per LoRA) and the wanted size; settings are keyword-only, with defaults.
ties, dare and prune are defined by the entries of ΔW, so they compute it, one module at a time. The others work on the factors.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import (
    delta,
    from_dense,
    matrices,
    outside,
    shaped,
    times_power_of_two,
    truncate,
    wide,
    wide_pair,
)
from unbraid.core.selectors import MEASURE, ROLES, TABLES, UNKNOWN, Blocks, left_out, selects


@dataclass(frozen=True)
class Part:
    """The factors that one LoRA has for a module, and its weight. `source`: its index in the list of LoRAs, counted from the end (-1 is the
    last)."""

    lora: Lora
    weight: float
    source: int


@dataclass(frozen=True)
class Size:
    """The wanted size of the result: a rank, or the share of the squared norm (energy) to keep. Without either the result is exact, or has
    the rank that `concat` would have."""

    rank: int | None = None
    energy: float | None = None


Made = tuple[Lora, float] | None  # merged module, share of its squared norm kept; None: the module is left out
Method = Callable[..., Made]


def concat(name: str, parts: Sequence[Part], size: Size) -> Made:
    """Σ w ΔW, exactly: the rows of all `down` are stacked unchanged, and the columns of all `up`. The first LoRA's w·alpha/r becomes the
    result's; the others' are divided by it and multiplied into their `up`. LoRAs with the same `down` (styles that `pair` trained in one
    slot) keep it, and their `up` are summed; LoRAs with the same `up` (QR-LoRAs of one base and rank) the other way round. Truncated by QR and SVD if a size is given."""
    if len(parts) == 1:
        lora = parts[0].lora
        joined = Lora(lora.down, lora.up, lora.alpha * parts[0].weight)
    else:
        downs, ups = zip(*(matrices(part.lora) for part in parts), strict=True)
        first = _strength(parts[0])  # goes into alpha, so that LoRAs of equal strength are joined unscaled
        scaled = [_times(up, _strength(part) / first) for up, part in zip(ups, parts, strict=True)]
        if all_equal(downs):
            down, up = downs[0], torch.stack(_promoted([wide(one) for one in scaled])).sum(0)
        elif all_equal(ups):
            weighted = [wide(down) * (_strength(part) / first) for down, part in zip(downs, parts, strict=True)]
            down, up = torch.stack(_promoted(weighted)).sum(0), ups[0]
        else:
            down, up = torch.cat(_promoted(downs)), torch.cat(_promoted(scaled), 1)
        joined = shaped(down, up, first * len(down), parts[0].lora)
    return (joined, 1.0) if size == Size() else truncate(joined, size.rank, size.energy)


def ties(name: str, parts: Sequence[Part], size: Size, *, density: float = 0.5) -> Made:
    """TIES (arXiv 2306.01708) on the entries of w ΔW: trim, take the sign of the sum, average the entries with that sign."""
    merged = _elect(_promoted([_trim(delta(part.lora), density).mul_(part.weight) for part in parts]))
    return _factored(name, merged, parts, size)


def dare(name: str, parts: Sequence[Part], size: Size, *, density: float = 0.5, seed: int = 0) -> Made:
    """DARE (arXiv 2311.03099): keep each entry with probability `density`, divide by it, sum. The random numbers depend on `seed`, the
    module's name and the LoRA's index."""
    total = torch.zeros(())
    for part in parts:
        rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {part.source} {name}".encode()))
        full = delta(part.lora)
        kept = torch.rand(full.shape, generator=rng) < density
        total = total + full * kept * (part.weight / density)
    return _factored(name, total, parts, size)


def prune(name: str, parts: Sequence[Part], size: Size, *, density: float = 0.5) -> Made:
    """Weighted sum of the largest entries of each ΔW, a share of `density` (ZipLoRA observes that 80 % can be dropped, arXiv 2311.13600)."""
    total = torch.stack(_promoted([_trim(delta(part.lora), density) * part.weight for part in parts])).sum(0)
    return _factored(name, total, parts, size)


def knots(name: str, parts: Sequence[Part], size: Size, *, density: float = 0.5) -> Made:
    """KnOTS (arXiv 2410.19735): TIES in the shared left basis U of [ΔW_1 | ΔW_2 | …]. The result's rank is at most Σ r, without
    truncation."""
    downs, ups = zip(*(wide_pair(part.lora) for part in parts), strict=True)
    downs, ups = _promoted(downs + ups)[: len(parts)], _promoted(downs + ups)[len(parts) :]
    basis, r = torch.linalg.qr(torch.cat(ups, 1))
    scales = [part.lora.alpha / len(part.lora.down) for part in parts]
    ranks = [len(down) for down in downs]
    tasks = [block @ down * s for block, down, s in zip(r.split(ranks, 1), downs, scales, strict=True)]
    turn = torch.linalg.svd(torch.linalg.qr(torch.cat(tasks, 1).T)[1].T)[
        0
    ]  # U from the small triangular factor, not from a d×k matrix
    merged = _elect([_trim(turn.T @ task, density) * part.weight for task, part in zip(tasks, parts, strict=True)])
    lora = shaped(merged, basis @ turn, float(len(merged)), parts[0].lora)
    return (lora, 1.0) if size == Size() else truncate(lora, size.rank, size.energy)


def np_lora(name: str, parts: Sequence[Part], size: Size, *, mu: float = 0.5) -> Made:
    """NP-LoRA (arXiv 2511.11051): the last LoRA is the style. Its input subspace Q (A_sᵀ = QR) is removed from the others:
    ΔW = ΔW_s + Σ ΔW_c (I − μ/(1+μ) QQᵀ). μ = 0.5 as published; a large μ is the hard projection."""
    style = next((part for part in parts if part.source == -1), None)
    if style is None:
        return concat(name, parts, size)
    protected = wide_pair(style.lora)[0]
    projected = []
    for part in parts:
        if part is not style:
            down, up = wide_pair(part.lora)
            part = Part(shaped(outside(down, protected, mu), up, part.lora.alpha, part.lora), part.weight, part.source)
        projected.append(part)
    return concat(name, projected, size)


def blocks(name: str, parts: Sequence[Part], size: Size, *, blocks: Blocks = TABLES["b-lora"].blocks) -> Made:
    """The content's layers of all LoRAs but the last, and the style's layers of the last; by default those of B-LoRA (OUT00,
    OUT01)."""
    mine = [part for part in parts if selects(blocks["style" if part.source == -1 else "content"], name)]
    return concat(name, mine, size) if mine else None


def roles(name: str, parts: Sequence[Part], size: Size, *, blocks: Blocks | None = None) -> Made:
    """The sum without the style's layers of all LoRAs but the last, and without the content's layers of the last. Layers without a
    role are everyone's. UsageError without `blocks`."""
    if not blocks:
        raise UsageError(UNKNOWN, "merge", MEASURE)
    left = {role: left_out(blocks, role) for role in ROLES}
    mine = [part for part in parts if not selects(left["style" if part.source == -1 else "content"], name)]
    return concat(name, mine, size) if mine else None


METHODS: dict[str, Method] = {
    "concat": concat,
    "ties": ties,
    "dare": dare,
    "prune": prune,
    "knots": knots,
    "np-lora": np_lora,
    "blocks": blocks,
    "roles": roles,
}


def all_equal(factors: Sequence[Tensor]) -> bool:
    """Whether all `down`, or all `up`, are equal."""
    return all(other.shape == factors[0].shape and torch.equal(other, factors[0]) for other in factors[1:])


def _strength(part: Part) -> float:
    return part.weight * part.lora.alpha / len(part.lora.down)


def _times(up: Tensor, factor: float) -> Tensor:
    quick = times_power_of_two(up, factor)
    return wide(up) * factor if quick is None else quick


def _promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _trim(full: Tensor, density: float) -> Tensor:
    """Set all entries to 0 but the largest by magnitude, a share of `density`."""
    keep = max(round(density * full.numel()), 1)
    if keep == full.numel():
        return full
    sizes = full.abs()
    floor = sizes.flatten().kthvalue(full.numel() - keep + 1).values
    return full * (sizes >= floor)


def _elect(weighted: Sequence[Tensor]) -> Tensor:
    """At each entry, the mean of the non-zero values that have the sign of the sum. One tensor after the other: a dense change
    of a large layer takes a lot of memory."""
    sign = reduce(torch.add, weighted).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for one in weighted:
        agrees = one * sign > 0
        total.addcmul_(one, agrees.to(one.dtype))
        count.add_(agrees)
    return total.div_(count.clamp_min_(1))


def _factored(name: str, merged: Tensor, parts: Sequence[Part], size: Size) -> tuple[Lora, float]:
    """A dense result as factors. Without a size they get the rank that `concat` would have."""
    rank = size.rank if size != Size() else min(sum(len(part.lora.down) for part in parts), *merged.shape)
    return from_dense(merged, parts[0].lora, rank, size.energy, zlib.crc32(name.encode()))
