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

Share = tuple[Active, ...]  # the adapters of equal rows
Item = tuple[Factors, Active] | int  # an adapter in a layer and a share; or a number of ranks in which there is nothing
Prompts = Mapping[str, Float[Tensor, "n k"]]


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
    told = _shares(rows[within])
    silent = _shares([tuple(replace(one, prompt=None) if one.prompt else one for one in row) for row in rows[within]])
    out: dict[str, Added] = {}
    for own, names in _alike(layers, own_prompt):
        some = [layers[name] for name in names]
        shares = [tuple(one for one in share if one.adapter in some[0]) for share in (told if own else silent)]
        fields: dict[str, tuple[Tensor, ...]] = {}
        if from_x := _chosen(shares, lambda one: one.prompt is None):
            down = _downs(some, from_x).to(dtype)
            fields["down"], fields["up"] = down.mT.unbind(0), _ups(some, from_x).to(dtype).unbind(0)
            if (ranks := _ranks(some, from_x)) is not None:
                fields["ranks"] = ranks.to(dtype).unbind(0)
        if from_prompts := _chosen(shares, lambda one: one.prompt is not None):
            fields["said"] = _said(some, from_prompts, prompts).to(dtype).unbind(0)
        for i, name in enumerate(names if fields else ()):
            out[name] = Added(within, **{key: value[i] for key, value in fields.items()})
    return out


def _alike(layers: Mapping[str, Mapping[str, Factors]], own_prompt: frozenset[str]) -> Iterator[tuple[bool, list[str]]]:
    """Layers whose factors can be stacked, and whether they are among `own_prompt`."""
    groups = defaultdict[tuple[object, ...], list[str]](list)
    for name, adapters in layers.items():
        shapes = [(adapter, one.down.shape, one.up.shape) for adapter, one in adapters.items()]
        groups[(name in own_prompt, *shapes)].append(name)
    for (own, *_), names in groups.items():
        yield bool(own), names


def _shares(rows: Sequence[Share]) -> list[Share]:
    """Neighbours that are alike are one share, where that makes equal shares."""
    runs = [(row, len(list(same))) for row, same in groupby(rows)]
    return [row for row, _ in runs] if len({n for _, n in runs}) == 1 else list(rows)


def _chosen(shares: Sequence[Share], wanted: Callable[[Active], bool]) -> list[Share]:
    """The adapters of a kind, if there are any. Where all shares have the same ones, one stands for all."""
    chosen = [tuple(one for one in share if wanted(one)) for share in shares]
    if not any(chosen):
        return []
    return chosen[:1] if len(set(chosen)) == 1 else chosen


def _items(layers: Sequence[Mapping[str, Factors]], shares: Sequence[Share]) -> tuple[list[Item], tuple[int, int, int]]:
    """What is stacked, share by share and layer by layer, and the numbers of layers, shares, and ranks of a share."""
    sizes = [sum(layers[0][one.adapter].down.shape[0] for one in share) for share in shares]
    most, items = max(sizes), list[Item]()
    for layer in layers:
        for share, size in zip(shares, sizes, strict=True):
            items += [(layer[one.adapter], one) for one in share]
            items += [most - size] if size < most else []
    return items, (len(layers), len(shares), most)


def _downs(layers: Sequence[Mapping[str, Factors]], shares: Sequence[Share]) -> Float[Tensor, "l g r k"]:
    items, shape = _items(layers, shares)
    like = next(iter(layers[0].values())).down.detach()
    downs = [like.new_zeros(item, like.shape[1]) if isinstance(item, int) else _down(*item) for item in items]
    return torch.cat(downs).unflatten(0, shape)


def _down(factors: Factors, active: Active) -> Tensor:
    down, columns = factors.plain(active.trains)[0], factors.columns
    if columns is None or not active.merger:
        return down
    return down * (columns if "merger" in active.trains else columns.detach())


def _ups(layers: Sequence[Mapping[str, Factors]], shares: Sequence[Share]) -> Float[Tensor, "l g r d"]:
    """scale · diag(g · mask) B, transposed."""
    items, shape = _items(layers, shares)
    like = next(iter(layers[0].values())).up.detach()
    ups = [like.new_zeros(len(like), item) if isinstance(item, int) else _up(*item) for item in items]
    gates = [None if isinstance(item, int) else _gate(*item) for item in items]
    if all(gate is None for gate in gates):
        up = torch.cat(ups, 1)
    elif len({one.shape[1] for one in ups}) == 1:  # all gates in one go
        ones = like.new_ones(len(like))
        gate = torch.stack([ones if one is None else one for one in gates], 1)[..., None]
        up = (torch.cat(ups, 1).unflatten(1, (len(items), -1)) * gate).flatten(1)
    else:
        up = torch.cat([one if gate is None else one * gate[:, None] for one, gate in zip(ups, gates, strict=True)], 1)
    return up.unflatten(1, shape).permute(1, 2, 3, 0)


def _up(factors: Factors, active: Active) -> Tensor:
    up, scale = factors.plain(active.trains)[1], active.scale * factors.scale
    return up if scale == 1 else up * scale


def _gate(factors: Factors, active: Active) -> Tensor | None:
    """g · mask, [d], or None where every channel is simply on."""
    channels = factors.channels
    if not active.merger or (channels is None and factors.mask is None):
        return None
    if channels is not None and "merger" not in active.trains:
        channels = channels.detach()
    gate = factors.gate(channels)
    return None if gate is None else gate.expand(factors.up.shape[0])


def _ranks(layers: Sequence[Mapping[str, Factors]], shares: Sequence[Share]) -> Float[Tensor, "l g 1 r"] | None:
    items, shape = _items(layers, shares)
    found = [None if isinstance(item, int) or not item[1].merger else item[0].ranks for item in items]
    if all(one is None for one in found):
        return None
    like = next(iter(layers[0].values())).down.detach()
    parts = []
    for item, ranks in zip(items, found, strict=True):
        if ranks is None:
            parts.append(like.new_ones(item if isinstance(item, int) else item[0].down.shape[0]))
        else:
            parts.append(ranks if not isinstance(item, int) and "merger" in item[1].trains else ranks.detach())
    return torch.cat(parts).unflatten(0, shape)[:, :, None]


def _said(
    layers: Sequence[Mapping[str, Factors]], shares: Sequence[Share], prompts: Prompts
) -> Float[Tensor, "l g n d"]:
    """What the adapters read from their own prompts: for each of them all layers in one product, then all of them layer by layer."""
    up, read = _ups(layers, shares), []
    tokens = len(next(prompts[one.prompt or ""] for share in shares for one in share))
    for share in shares:
        parts = []
        for one in share:
            down, ranks = _downs(layers, [(one,)]), _ranks(layers, [(one,)])
            down = down if ranks is None else down * ranks.mT
            inner = F.linear(prompts[one.prompt or ""].to(down.dtype), down.flatten(0, 2))
            parts.append(inner.unflatten(1, (len(layers), -1)))
        if missing := up.shape[2] - sum(one.shape[2] for one in parts):
            parts.append(up.new_zeros(tokens, len(layers), missing))
        read.append(torch.cat(parts, 2))
    return torch.stack(read, 1).permute(2, 1, 0, 3) @ up
