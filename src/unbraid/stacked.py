"""What is active, for all layers at once: factors of equal shapes are stacked, gated and cast together.

A model has hundreds of adapted layers. Layer by layer, the mergers, scales and casts of small factors cost more time than the
products with x. Here they are a few operations on stacks `[layers, shares, …]`, and a layer is left with two products. What
adapters read from a prompt of their own does not depend on x: all of that is done here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unbraid.lora import Active, Factors

Slot = tuple[Active | None, ...]  # at most one adapter for every share of the rows
Prompts = Mapping[str, Float[Tensor, "n k"]]
Stack = tuple[
    Tensor, Tensor, Tensor | None
]  # A [L, g, r, k], scale · diag(g) B [L, g, d, r], n [L, g, 1, r] of L layers


@dataclass(frozen=True)
class Added:
    """What one layer adds to some neighbouring rows: g equal shares of them, one after the other, have their own factors; g = 1
    serves any number of rows. ((x down) ⊙ ranks) up, and what was `said`: read from own prompts."""

    rows: slice
    down: Float[Tensor, "g k r"] | None = None
    up: Float[Tensor, "g r d"] | None = None
    ranks: Float[Tensor, "g 1 r"] | None = None
    said: Float[Tensor, "g n d"] | None = None

    def to(self, y: Float[Tensor, "b *n d"], x: Float[Tensor, "b *n k"]) -> Float[Tensor, "b *n d"]:
        """y with it."""
        begin, end = self.rows.start, self.rows.stop
        if end - begin == len(y):
            return self._to(y, x)
        return torch.cat([y[:begin], self._to(y[begin:end], x[begin:end]), y[end:]])

    def _to(self, y: Tensor, x: Tensor) -> Tensor:
        shape = y.shape
        if self.down is not None and self.up is not None:
            g = len(self.down)
            inner = torch.bmm(x.reshape(g, -1, x.shape[-1]), self.down)
            inner = inner if self.ranks is None else inner * self.ranks
            y = torch.baddbmm(y.reshape(g, -1, shape[-1]), inner, self.up).view(shape)
        if self.said is not None:
            y = (y.unflatten(0, (len(self.said), -1)) + self.said[:, None]).view(shape)
        return y


def stacked(
    layers: Mapping[str, Mapping[str, Factors]],
    own_prompt: frozenset[str],
    rows: Sequence[tuple[Active, ...]],
    prompts: Prompts,
    dtype: torch.dtype,
) -> dict[str, Added]:
    """Layer → what it adds, from layer → adapter → factors. `own_prompt`: the layers whose adapters can read their own prompts."""
    busy = [i for i, row in enumerate(rows) if row]
    if not busy:
        return {}
    within = slice(busy[0], busy[-1] + 1)
    told = rows[within]
    silent = [tuple(replace(one, prompt=None) if one.prompt else one for one in row) for row in told]
    out: dict[str, Added] = {}
    for own, names in _alike(layers, own_prompt):
        some = [layers[name] for name in names]
        slots = _slots([tuple(one for one in row if one.adapter in some[0]) for row in (told if own else silent)])
        fields: dict[str, tuple[Tensor, ...]] = {}
        if from_x := _chosen(slots, lambda one: one.prompt is None):
            down, up, ranks = _joined([_stack(some, slot) for slot in from_x])
            fields["down"], fields["up"] = down.to(dtype).mT.unbind(0), up.to(dtype).mT.unbind(0)
            fields |= {} if ranks is None else {"ranks": ranks.to(dtype).unbind(0)}
        if from_prompts := _chosen(slots, lambda one: one.prompt is not None):
            fields["said"] = (
                _said([_stack(some, slot) for slot in from_prompts], from_prompts, prompts).to(dtype).unbind(0)
            )
        out |= {
            name: Added(within, **{key: value[i] for key, value in fields.items()})
            for i, name in enumerate(names)
            if fields
        }
    return out


def _alike(layers: Mapping[str, Mapping[str, Factors]], own_prompt: frozenset[str]) -> Iterator[tuple[bool, list[str]]]:
    """Layers whose factors can be stacked, and whether they are among `own_prompt`."""
    groups = defaultdict[tuple[object, ...], list[str]](list)
    for name, adapters in layers.items():
        shapes = [(adapter, one.down.shape, one.up.shape) for adapter, one in adapters.items()]
        groups[(name in own_prompt, *shapes)].append(name)
    for (own, *_), names in groups.items():
        yield bool(own), names


def _slots(rows: Sequence[tuple[Active, ...]]) -> list[Slot]:
    """Rows side by side: the i-th adapter of every share. Neighbours that are alike are one share where that makes equal shares."""
    runs = [(row, len(list(same))) for row, same in groupby(rows)]
    shares = [row for row, _ in runs] if len({n for _, n in runs}) == 1 else list(rows)
    return [tuple(row[i] if i < len(row) else None for row in shares) for i in range(max(map(len, shares)))]


def _chosen(slots: Sequence[Slot], wanted: Callable[[Active], bool]) -> list[Slot]:
    """The adapters of a kind. Where all shares have the same ones, one share stands for all."""
    chosen = [tuple(one if one and wanted(one) else None for one in slot) for slot in slots]
    chosen = [slot for slot in chosen if any(slot)]
    return [slot[:1] for slot in chosen] if all(len(set(slot)) == 1 for slot in chosen) else chosen


def _stack(layers: Sequence[Mapping[str, Factors]], slot: Slot) -> Stack:
    """One slot of several layers. Where a share has no adapter in it, and in ranks that only others have: zeros."""
    pairs = [(layer[one.adapter], one) if one else None for layer in layers for one in slot]
    shape, rank = (len(layers), len(slot)), max(pair[0].down.shape[0] for pair in pairs if pair)
    factors = [_padded(*pair[0].plain(pair[1].trains), rank) if pair else None for pair in pairs]
    empty = next([torch.zeros_like(part.detach()) for part in pair] for pair in factors if pair)
    down, up = (torch.stack([pair[i] if pair else empty[i] for pair in factors]).unflatten(0, shape) for i in (0, 1))
    columns = _mergers(pairs, lambda one: one.columns, down[0, 0, 0].detach())
    ranks = _mergers(pairs, lambda one: one.ranks, down[0, 0, :, 0].detach())
    down = down if columns is None else down * columns.unflatten(0, shape)[..., None, :]
    for gate in (
        _mergers(pairs, lambda one: one.channels, up[0, 0, :, 0].detach()),
        _mergers(pairs, lambda one: one.mask, up[0, 0, :, 0].detach()),
    ):
        up = up if gate is None else up * gate.unflatten(0, shape)[..., None]
    scales = [pair[0].scale * pair[1].scale if pair else 0.0 for pair in pairs]
    if len(set(scales)) > 1:
        up = up * up.new_tensor(scales).view(*shape, 1, 1)
    elif scales[0] != 1:
        up = up * scales[0]
    return down, up, None if ranks is None else ranks.unflatten(0, shape)[..., None, :]


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - down.shape[0]
    return (F.pad(down, (0, 0, 0, more)), F.pad(up, (0, more))) if more else (down, up)


def _mergers(
    pairs: Sequence[tuple[Factors, Active] | None], of: Callable[[Factors], Tensor | None], like: Tensor
) -> Tensor | None:
    """`[layers · shares, size]`, ones where there is none; None where there is none at all."""
    found = [of(pair[0]) if pair and pair[1].merger else None for pair in pairs]
    if all(one is None for one in found):
        return None
    ones, (size,) = torch.ones_like(like), like.shape
    full = [ones if one is None else one if one.shape[0] == size else _widened(one, size) for one in found]
    trains = [bool(pair and "merger" in pair[1].trains) for pair in pairs]
    return torch.stack([one if learns else one.detach() for one, learns in zip(full, trains, strict=True)])


def _widened(merger: Tensor, size: int) -> Tensor:
    """One value is for all; what ranks are missing get ones."""
    return merger.expand(size) if len(merger) == 1 else F.pad(merger, (0, size - len(merger)), value=1.0)


def _joined(stacks: Sequence[Stack]) -> Stack:
    """Slots side by side: their ranks together."""
    downs, ups, ranks = zip(*stacks, strict=True)
    down, up = (parts[0] if len(parts) == 1 else torch.cat(parts, dim) for parts, dim in ((downs, 2), (ups, 3)))
    if all(one is None for one in ranks):
        return down, up, None
    sizes = [down.shape[2] for down in downs]
    full = [
        down.new_ones(*down.shape[:2], 1, size) if one is None else one for one, size in zip(ranks, sizes, strict=True)
    ]
    return down, up, torch.cat(full, 3)


def _said(stacks: Sequence[Stack], slots: Sequence[Slot], prompts: Prompts) -> Tensor:
    """What the adapters of all slots read from their prompts, `[L, g, n, d]`; in a share without one, zeros are read."""
    inner = []
    for (down, _, ranks), slot in zip(stacks, slots, strict=True):
        texts = [prompts[one.prompt] if one and one.prompt else None for one in slot]
        zeros = torch.zeros_like(next(text for text in texts if text is not None))
        text = torch.stack([zeros if text is None else text for text in texts])
        read = text.to(down.dtype) @ down.mT
        inner.append(read if ranks is None else read * ranks)
    return torch.cat(inner, 3) @ torch.cat([up for _, up, _ in stacks], 3).mT
