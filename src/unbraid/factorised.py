"""What adapters add to a linear layer, as one operation: few kernels, and little kept for gradients.

The adapters that work on the same rows are stacked: their downs to one [R, k], their gated ups to one [d, R]. So a layer costs two
products more than without adapters, whatever their number, and the second is added into the frozen layer's output as it is
computed. x is kept for gradients only where a down trains. Equal to the formula of `lora.py`, gradients too (tests/test_lora.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Rows = slice | Tensor  # of a batch: neighbours as a slice, which costs no copy, else their indices


@dataclass(frozen=True)
class Change:
    """What one adapter adds: scale · g ⊙ B (n ⊙ A x)."""

    down: Float[Tensor, "r k"]
    up: Float[Tensor, "d r"]
    ranks: Float[Tensor, " r"] | None = None  # n
    gate: Float[Tensor, "*d"] | None = None  # g, [d] or [1]
    scale: float = 1.0


class Place(NamedTuple):
    """Where adapters work: on some rows of the batch, reading x there, or else a prompt of their own."""

    rows: Rows
    prompt: Float[Tensor, "n k"] | None


def add_changes(
    y: Float[Tensor, "b *n d"], x: Float[Tensor, "b *n k"], work: Sequence[tuple[Place, list[Change]]]
) -> Tensor:
    """y + all changes, `[b, *n, d]`. y is overwritten."""
    changes = [change for _, some in work for change in some]
    tensors = [tensor for one in changes for tensor in (one.down, one.up, one.ranks, one.gate)]
    groups = [(place, tuple(one.scale for one in some)) for place, some in work]
    return _AddChanges.apply(y, x, groups, *tensors)  # type: ignore[return-value]


_Groups = list[tuple[Place, tuple[float, ...]]]  # where, and the scale of every adapter there
_Four = tuple[Any, ...]  # of one adapter's down, up, ranks and gate: the tensors, or whether they need gradients


class _AddChanges(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, groups: _Groups, *tensors: Tensor | None) -> Tensor:
        ctx.mark_dirty(y)
        ctx.groups, ctx.shape = groups, x.shape
        kept: list[Tensor | None] = []
        for place, scales, ours, needs in _by_group(groups, tensors, ctx.needs_input_grad[3:]):
            seen = _seen(x, place)
            down, up, ranks = _stacked(ours, scales, x.dtype)
            inner = seen @ down.T
            _add(y, place, inner if ranks is None else inner * ranks, up)
            trained = [any(flags) for flags in zip(*needs, strict=True)]
            kept += [seen if trained[0] else None, inner if any(trained[1:]) else None, down, up, ranks]
        ctx.save_for_backward(*kept, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), saved, first = grads, ctx.saved_tensors, 5 * len(ctx.groups)
        out: list[Tensor | None] = []
        dx = None
        for i, (place, scales, ours, needs) in enumerate(
            _by_group(ctx.groups, saved[first:], ctx.needs_input_grad[3:])
        ):
            seen, inner, down, up, ranks = saved[5 * i : 5 * i + 5]
            gone = (g[place.rows] if place.prompt is None else g[place.rows].sum(0)).reshape(-1, g.shape[-1])
            back = gone @ up  # [N, R]: the gradient of n ⊙ A x
            scaled = back if ranks is None else back * ranks
            if ctx.needs_input_grad[1] and place.prompt is None:
                dx = _set_rows(dx, scaled @ down, place.rows, ctx.shape)
            out += _gradients(gone, (seen, inner, ranks), (back, scaled), list(zip(scales, ours, needs, strict=True)))
        return (g, dx, None, *out)


def _by_group(
    groups: _Groups, tensors: Sequence[Any], needs: Sequence[bool]
) -> Iterator[tuple[Place, tuple[float, ...], list[_Four], list[_Four]]]:
    at = 0
    for place, scales in groups:
        spans = range(at, at + 4 * len(scales), 4)
        yield place, scales, [tensors[i : i + 4] for i in spans], [needs[i : i + 4] for i in spans]
        at = spans.stop


def _seen(x: Tensor, place: Place) -> Tensor:
    """What the adapters read, `[N, k]`."""
    return (x[place.rows] if place.prompt is None else place.prompt.to(x.dtype)).reshape(-1, x.shape[-1])


def _stacked(ours: list[_Four], scales: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """A [R, k], scale · diag(g) B [d, R] and n [R] of several adapters."""
    ups = []
    for (_, up, _, gate), scale in zip(ours, scales, strict=True):
        up = up if gate is None else up * gate[:, None]
        ups.append(up if scale == 1 else up * scale)
    ranks = None
    if any(one[2] is not None for one in ours):
        ranks = _cat([one[0].new_ones(len(one[0])) if one[2] is None else one[2] for one in ours], 0).to(dtype)
    return _cat([one[0] for one in ours], 0).to(dtype), _cat(ups, 1).to(dtype), ranks


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _add(y: Tensor, place: Place, inner: Tensor, up: Tensor) -> None:
    """y[rows] += inner upᵀ; where the adapters read their own prompt, the same for every row."""
    if isinstance(place.rows, slice) and place.prompt is None:
        y[place.rows].view(-1, y.shape[-1]).addmm_(inner, up.T)
        return
    delta = inner @ up.T
    if isinstance(place.rows, slice):
        y[place.rows] += delta
    else:
        y.index_add_(
            0,
            place.rows,
            delta.expand(len(place.rows), *y.shape[1:]) if place.prompt is not None else delta.view(-1, *y.shape[1:]),
        )


def _set_rows(dx: Tensor | None, some: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
    """x's gradient, with what one group says of its rows. No row is in two groups."""
    if rows == slice(None):
        return some.view(shape)
    dx = some.new_zeros(shape) if dx is None else dx
    dx[rows] = some.view(-1, *shape[1:])
    return dx


def _gradients(
    gone: Tensor,
    saved: tuple[Tensor | None, ...],
    back: tuple[Tensor, Tensor],
    adapters: list[tuple[float, _Four, _Four]],
) -> list[Tensor | None]:
    """Of down, up, ranks and gate of every adapter, those that are needed. One product serves all downs, another one all ups."""
    seen, inner, ranks = saved
    ends = list(accumulate((len(ours[0]) for _, ours, _ in adapters), initial=0))
    downs = _span([needs[0] for _, _, needs in adapters], ends)
    ups = _span([needs[1] or needs[3] for _, _, needs in adapters], ends)
    for_downs = back[1][:, downs].T @ seen if seen is not None else gone
    for_ups = gone.T @ (inner if ranks is None else inner * ranks)[:, ups] if inner is not None else gone
    for_ranks = (back[0] * inner).sum(0) if inner is not None and any(needs[2] for _, _, needs in adapters) else gone
    out: list[Tensor | None] = []
    for (scale, (_, up, _, gate), needs), begin, end in zip(adapters, ends, ends[1:], strict=False):
        out.append(for_downs[begin - downs.start : end - downs.start] if needs[0] else None)
        one = for_ups[:, begin - ups.start : end - ups.start] if needs[1] or needs[3] else gone
        one = one if scale == 1 else one * scale
        out.append((one if gate is None else one * gate[:, None]) if needs[1] else None)
        out.append(for_ranks[begin:end] if needs[2] else None)
        out.append((one * up).sum(1 if len(gate) > 1 else None).view(gate.shape) if needs[3] else None)
    return out


def _span(needed: list[bool], ends: list[int]) -> slice:
    """The ranks from the first to the last adapter that is needed."""
    places = [i for i, one in enumerate(needed) if one]
    return slice(ends[places[0]], ends[places[-1] + 1]) if places else slice(0, 0)
