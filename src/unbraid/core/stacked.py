"""The active adapters of all layers, prepared together: factors of the same form are gated, concatenated and cast at once.

A model has hundreds of adapted layers. If each layer applied mergers, scales and casts to its own small factors, this
would take longer than the products with x. Here they are a few operations on stacks `[layers, shares, …]`, and each layer
has only two products left to compute. What adapters read from their own prompts does not depend on x, so it is computed
here completely.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unbraid.core.lora import Active, Factors
from unbraid.core.packing import Group

Share = tuple[Active, ...]  # the active adapters of neighbouring rows that have the same ones
Stacks = Mapping[str, Factors]  # adapter → its factors in all layers of a group
Item = tuple[Factors, Active] | int  # an adapter in a share, or a number of ranks of padding
Prompts = Mapping[str, Float[Tensor, "n k"]]
EVERY = slice(None)


@dataclass(frozen=True)
class Added:
    """What one layer adds to a range of rows: ((x downᵀ) ⊙ ranks) up + `prompt_term`. The latter comes from adapters that
    read their own prompts. If the rows are g shares of equal size, each share has its own factors. `texts`: 1 where a rank
    acts on a token of the text, else 0; the text's tokens are the first, and every rank acts on those after them."""

    rows: slice
    down: Float[Tensor, "*g r k"] | None = None
    up: Float[Tensor, "*g r d"] | None = None
    ranks: Float[Tensor, "*g 1 r"] | None = None
    prompt_term: Float[Tensor, "g n d"] | None = None
    texts: Float[Tensor, "*g n r"] | None = None

    def to(self, y: Float[Tensor, "b *n d"], x: Float[Tensor, "b *n k"]) -> Float[Tensor, "b *n d"]:
        """y plus this change."""
        if self.rows == EVERY:
            return self._to(y, x)
        begin, end = self.rows.start, self.rows.stop
        return torch.cat([y[:begin], self._to(y[begin:end], x[begin:end]), y[end:]])

    def _to(self, y: Tensor, x: Tensor) -> Tensor:
        shape = y.shape
        if self.down is not None and self.up is not None:
            *g, _, k = self.down.shape
            inner = torch.bmm(x.reshape(*g, -1, k), self.down.mT) if g else F.linear(x.reshape(-1, k), self.down)
            inner = inner if self.ranks is None else inner * self.ranks
            inner = inner if self.texts is None else _gated(inner, self.texts, x.shape[-2])
            y = (torch.baddbmm if g else torch.addmm)(y.reshape(*g, -1, shape[-1]), inner, self.up).view(shape)
        if self.prompt_term is not None:
            y = (y.unflatten(0, (len(self.prompt_term), -1)) + self.prompt_term[:, None]).view(shape)
        return y


def _gated(inner: Float[Tensor, "*g m r"], texts: Float[Tensor, "*g n r"], tokens: int) -> Float[Tensor, "*g m r"]:
    """`inner` times `texts` in the first tokens of each row, and unchanged in the others. `tokens`: of a row."""
    if tokens < texts.shape[-2]:
        raise ValueError(f"{tokens} tokens, but the segments of the text have {texts.shape[-2]}")
    every = F.pad(texts, (0, 0, 0, tokens - texts.shape[-2]), value=1.0)
    return (inner.unflatten(-2, (-1, tokens)) * every.unsqueeze(-3)).flatten(-3, -2)


def stacked(
    groups: Iterable[Group],
    rows: Sequence[tuple[Active, ...]],
    prompts: Prompts,
    dtype: torch.dtype,
    text_layers: frozenset[str] = frozenset(),
) -> dict[str, Added]:
    """Layer → what the active adapters add to it. `rows`: the active adapters of each row of the batch. Layers without
    any are left out. `text_layers`: the layers that read the tokens of the text."""
    active = [i for i, row in enumerate(rows) if row]
    if not active:
        return {}
    within = slice(active[0], active[-1] + 1) if len(active) < len(rows) else EVERY
    with_prompts = _shares(rows[within])
    without = _shares([tuple(replace(one, prompt=None) if one.prompt else one for one in row) for row in rows[within]])
    tokens = next((len(prompts[one.prompt or ""]) for row in rows for one in row if one.segment), 0)
    out: dict[str, Added] = {}
    for group in groups:
        some = group.factors
        shares = [
            tuple(one for one in share if one.adapter in some)
            for share in (with_prompts if group.own_prompt else without)
        ]
        fields, texts = dict[str, tuple[Tensor, ...]](), None
        if from_x := _chosen(shares, lambda one: one.prompt is None):
            found = {"down": _downs(some, from_x), "up": _ups(some, from_x), "ranks": _ranks(some, from_x)}
            for key, value in found.items():
                if value is not None:
                    fields[key] = (value if len(from_x) > 1 else value.squeeze(1)).to(dtype).unbind(0)
            texts = _texts(some, from_x, tokens, dtype) if tokens else None
        if from_prompts := _chosen(shares, lambda one: one.prompt is not None):
            fields["prompt_term"] = _prompt_term(some, from_prompts, prompts).to(dtype).unbind(0)
        for i, name in enumerate(group.names if fields else ()):
            masks = texts if name in text_layers else None
            out[name] = Added(within, **{key: value[i] for key, value in fields.items()}, texts=masks)
    return out


def _texts(some: Stacks, shares: Sequence[Share], tokens: int, dtype: torch.dtype) -> Float[Tensor, "*g n r"] | None:
    """Where each rank acts on the text; None: everywhere. `tokens`: of one segment."""
    count = next((one.segment[1] for share in shares for one in share if one.segment), 0)
    if not count:
        return None
    items, shape = _items(some, shares)
    like, parts = next(iter(some.values())).down.detach(), list[Tensor]()
    for item in items:
        segment = None if isinstance(item, int) else item[1].segment
        rank = item if isinstance(item, int) else item[0].down.shape[-2]
        part = like.new_full((count, tokens, rank), 0.0 if segment else 1.0, dtype=dtype)
        if segment:
            part[segment[0]] = 1.0
        parts.append(part.flatten(0, 1))
    found = torch.cat(parts, 1).unflatten(1, shape).movedim(1, 0)
    return found if len(shares) > 1 else found.squeeze(0)


def _shares(rows: Sequence[Share]) -> list[Share]:
    """Combine neighbouring equal rows into shares if all shares then have the same size. Else each row is a share."""
    runs = [(row, len(list(same))) for row, same in groupby(rows)]
    return [row for row, _ in runs] if len({n for _, n in runs}) == 1 else list(rows)


def _chosen(shares: Sequence[Share], wanted: Callable[[Active], bool]) -> list[Share]:
    """The adapters of each share that `wanted` accepts; empty if there are none. If all shares have the same adapters,
    only one share is returned."""
    chosen = [tuple(one for one in share if wanted(one)) for share in shares]
    if not any(chosen):
        return []
    return chosen[:1] if len(set(chosen)) == 1 else chosen


def _items(some: Stacks, shares: Sequence[Share]) -> tuple[list[Item], tuple[int, int]]:
    """The items to concatenate, share by share, and (shares, ranks of a share). Shares with fewer ranks are padded."""
    sizes = [sum(some[one.adapter].down.shape[-2] for one in share) for share in shares]
    most, items = max(sizes), list[Item]()
    for share, size in zip(shares, sizes, strict=True):
        items += [(some[one.adapter], one) for one in share]
        items += [most - size] if size < most else []
    return items, (len(shares), most)


def _downs(some: Stacks, shares: Sequence[Share]) -> Float[Tensor, "l g r k"]:
    items, shape = _items(some, shares)
    layers, _, k = next(iter(some.values())).down.shape
    like = next(iter(some.values())).down.detach()
    return _cat([like.new_zeros(layers, one, k) if isinstance(one, int) else _down(*one) for one in items], shape)


def _down(factors: Factors, active: Active) -> Tensor:
    down, columns = factors.plain(active.trains)[0], factors.columns
    if columns is None or not active.merger:
        return down
    return down * (columns if "merger" in active.trains else columns.detach())[:, None]


def _ups(some: Stacks, shares: Sequence[Share]) -> Float[Tensor, "l g r d"]:
    """scale · diag(g · mask) B, transposed."""
    items, shape = _items(some, shares)
    layers, d, _ = next(iter(some.values())).up.shape
    like = next(iter(some.values())).up.detach()
    return _cat([like.new_zeros(layers, one, d) if isinstance(one, int) else _up(*one) for one in items], shape)


def _up(factors: Factors, active: Active) -> Float[Tensor, "l r d"]:
    up, scale, channels = factors.plain(active.trains)[1].mT, active.scale * factors.scale, factors.channels
    up = up if scale == 1 else up * scale
    if channels is not None and "merger" not in active.trains:
        channels = channels.detach()
    gate = factors.gate(channels) if active.merger else None
    return up if gate is None else up * gate[:, None]


def _ranks(some: Stacks, shares: Sequence[Share]) -> Float[Tensor, "l g 1 r"] | None:
    items, shape = _items(some, shares)
    found = [None if isinstance(item, int) or not item[1].merger else item[0].ranks for item in items]
    if all(one is None for one in found):
        return None
    like = next(iter(some.values())).down.detach()
    parts = []
    for item, ranks in zip(items, found, strict=True):
        if ranks is None:
            parts.append(like.new_ones(len(like), item if isinstance(item, int) else item[0].down.shape[-2]))
        else:
            parts.append(ranks if not isinstance(item, int) and "merger" in item[1].trains else ranks.detach())
    return _cat(parts, shape)[:, :, None]


def _cat(parts: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """Concatenate items `[l, r, …]` to `[l, shares, ranks, …]`."""
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)).unflatten(1, shape)


def _prompt_term(some: Stacks, shares: Sequence[Share], prompts: Prompts) -> Float[Tensor, "l g n d"]:
    """What the adapters read from their own prompts. The products with `down` are one product per adapter for all
    layers; those with `up` are one batched product."""
    up, read = _ups(some, shares), []
    tokens = len(next(prompts[one.prompt or ""] for share in shares for one in share))
    for share in shares:
        parts = []
        for one in share:
            down, ranks = _downs(some, [(one,)]), _ranks(some, [(one,)])
            down = down if ranks is None else down * ranks.mT
            inner = F.linear(prompts[one.prompt or ""].to(down.dtype), down.flatten(0, 2))
            parts.append(inner.unflatten(1, (len(up), -1)))
        if missing := up.shape[2] - sum(one.shape[2] for one in parts):
            parts.append(up.new_zeros(tokens, len(up), missing))
        read.append(torch.cat(parts, 2))
    return torch.stack(read, 1).permute(2, 1, 0, 3) @ up
