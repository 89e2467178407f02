"""The adapters of several jobs on one model: every row of a batch has its own, and rows of like structure are one batched product.

It is the equation of `unbraid.lora` for each row. What is stacked anew in every pass are the factors, which are small beside
what they are applied to; gradients arrive in each job's own parameters.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unbraid.adapters import Adapters, place
from unbraid.lora import Active, Factors, Fixed, Part

Rows = tuple[tuple[Active, ...], ...]
MERGERS = ("columns", "ranks", "channels")
FIXED = ("down", "up", "down_ranks", "columns", "up_ranks", "rows")
KEPT = 64  # plans; a recipe has a few kinds of step


@dataclass(frozen=True)
class _Entry:
    """One adapter as it is used in some rows."""

    factors: Factors
    merger: bool
    trains: frozenset[Part]

    def part(self, name: str, part: Part) -> Tensor | None:
        parameter = getattr(self.factors, name)
        return parameter if parameter is None or part in self.trains else parameter.detach()

    def structure(self) -> tuple[object, ...]:
        """What entries must have in common to be stacked."""
        one = self.factors
        mergers = tuple(len(m) if (m := getattr(one, name)) is not None else 0 for name in MERGERS)
        gated = (mergers, one.mask is not None) if self.merger else ()
        return len(one.down), one.fixed is not None, gated


@dataclass(frozen=True)
class _Bank:
    """Entries of one structure; their factors are stacked once per layer and pass, however many rows use them."""

    entries: tuple[_Entry, ...]

    def factors(self, like: Tensor) -> tuple[Float[Tensor, "n r k"], Float[Tensor, "n d r"]]:
        down, up = self._stacked("down", "down"), self._stacked("up", "up")
        assert down is not None and up is not None
        first = self.entries[0]
        if first.factors.fixed:
            down, up = self._completed(down, up)
        if first.merger:
            down, up = self._merged(down, up)
        return down.to(like.dtype), up.to(like.dtype)

    def _stacked(self, name: str, part: Part) -> Tensor | None:
        parts = [one for entry in self.entries if (one := entry.part(name, part)) is not None]
        return torch.stack(parts) if parts else None

    def _merged(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        columns, ranks, gate = (self._stacked(name, "merger") for name in MERGERS)
        masks = [entry.factors.mask for entry in self.entries if entry.factors.mask is not None]
        if masks:
            gate = torch.stack(masks) if gate is None else gate * torch.stack(masks)
        down = down if columns is None else down * columns[:, None, :]
        down = down if ranks is None else down * ranks[:, :, None]
        return down, up if gate is None else up * gate[:, :, None]

    def _completed(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        given = [fixed for entry in self.entries if isinstance(fixed := entry.factors.fixed, Fixed)]
        fixed = {name: torch.stack([getattr(one, name) for one in given]) for name in FIXED}
        free_down = down * (fixed["down_ranks"][:, :, None] * fixed["columns"][:, None, :])
        free_up = up * (fixed["rows"][:, :, None] * fixed["up_ranks"][:, None, :])
        return fixed["down"] + free_down, fixed["up"] + free_up


@dataclass(frozen=True)
class _Use:
    """One place in the rows of a group: from which bank, which entry for each row (None: all, in their order), how strongly
    (None: 1), and the rows' own prompts `[rows, tokens, k]` (None: the layer's input)."""

    bank: int
    which: Tensor | None
    scales: Tensor | None
    prompts: Tensor | None


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows that differ in nothing but whose adapters they use; the uses that read the layer's input are first."""

    size: int
    uses: tuple[_Use, ...]

    def add(
        self, y: Float[Tensor, "b n d"], x: Float[Tensor, "b n k"], banks: Sequence[tuple[Tensor, Tensor]]
    ) -> Float[Tensor, "b n d"]:
        if not self.uses:
            return y
        downs, ups, hidden = [], [], []
        for use in self.uses:
            down, up = banks[use.bank]
            if use.which is not None:
                down, up = down.index_select(0, use.which), up.index_select(0, use.which)
            ups.append(up if use.scales is None else up * use.scales.to(up.dtype))
            if use.prompts is None:
                downs.append(down)
            else:
                hidden.append(torch.bmm(use.prompts.to(x.dtype), down.mT))
        if downs:
            hidden.insert(0, torch.bmm(x, _joined(downs, 1).mT))
        return torch.baddbmm(y, _joined(hidden, 2), _joined(ups, 2).mT)


@dataclass(frozen=True)
class _Plan:
    banks: tuple[_Bank, ...]
    groups: tuple[_Group, ...]


@dataclass
class _Now:
    """What is active now; every layer looks at the same object. `number`: of these rows."""

    number: int = -1
    rows: Rows = ()
    prompts: Mapping[str, Tensor] | None = None


class RowLinear(nn.Module):
    """A frozen linear layer, and the adapters of several jobs on it, by `JOB/ADAPTER`."""

    def __init__(self, base: nn.Linear, now: _Now, own_prompt: bool, factors: Mapping[str, Factors]) -> None:
        super().__init__()
        self.base, self.now, self.own_prompt, self.factors = base, now, own_prompt, dict(factors)
        self.plans: dict[int, _Plan] = {}

    @property
    def weight(self) -> Tensor:  # diffusers' attention code looks at its projections' weights
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Float[Tensor, "b *n k"]) -> Float[Tensor, "b *n d"]:
        y = self.base(x)
        if self.now.number not in self.plans:
            if len(self.plans) >= KEPT:
                self.plans.clear()
            self.plans[self.now.number] = self._plan(x.device)
        plan = self.plans[self.now.number]
        if not plan.banks:
            return y
        banks = [bank.factors(x) for bank in plan.banks]
        flat_x, flat_y = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
        sizes = [group.size for group in plan.groups]
        parts = zip(plan.groups, flat_y.split(sizes), flat_x.split(sizes), strict=True)
        return _joined([group.add(own_y, own_x, banks) for group, own_y, own_x in parts], 0).reshape(y.shape)

    def _plan(self, device: torch.device) -> _Plan:
        """Rows → neighbours of like structure; adapters that have a role and a structure in common → a bank."""
        uses = [sorted(self._here(row), key=lambda one: self._reads(one) is not None) for row in self.now.rows]
        banks: dict[tuple[object, ...], dict[_Entry, int]] = defaultdict(dict)
        for active in (active for row in uses for active in row):
            entries = banks[self._bank(active)]
            entries.setdefault(self._entry(active), len(entries))
        groups = []
        for _, found in groupby(uses, key=lambda row: [(self._bank(one), self._reads(one) is None) for one in row]):
            rows = list(found)
            columns = zip(*rows, strict=True)
            groups.append(_Group(len(rows), tuple(self._use(column, banks, device) for column in columns)))
        return _Plan(tuple(_Bank(tuple(entries)) for entries in banks.values()), tuple(groups))

    def _here(self, row: tuple[Active, ...]) -> list[Active]:
        return [active for active in row if active.scale and active.adapter in self.factors]

    def _entry(self, active: Active) -> _Entry:
        return _Entry(self.factors[active.adapter], active.merger, active.trains)

    def _reads(self, active: Active) -> str | None:
        return active.prompt if self.own_prompt else None

    def _bank(self, active: Active) -> tuple[object, ...]:
        return active.adapter.partition("/")[2], self._entry(active).structure()

    def _use(
        self,
        column: tuple[Active, ...],
        banks: Mapping[tuple[object, ...], Mapping[_Entry, int]],
        device: torch.device,
    ) -> _Use:
        entries = banks[self._bank(column[0])]
        which = [entries[self._entry(active)] for active in column]
        scales = [active.scale * self.factors[active.adapter].scale for active in column]
        prompts = [self.now.prompts[role] for one in column if self.now.prompts and (role := self._reads(one))]
        return _Use(
            list(banks).index(self._bank(column[0])),
            None if which == list(range(len(entries))) else torch.tensor(which, device=device),
            None if set(scales) == {1.0} else torch.tensor(scales, device=device, dtype=torch.float64)[:, None, None],
            torch.stack(prompts) if prompts else None,
        )


class RowAdapters:
    """The adapters of several jobs, each with an `Adapters` of its own, on the model that they share."""

    def __init__(self, jobs: Mapping[str, Adapters]) -> None:
        self.model = next(iter(jobs.values())).model
        self._now, self._numbers = _Now(), dict[Rows, int]()
        self.layers: dict[str, RowLinear] = {}
        for adapters in jobs.values():
            for name, layer in adapters.layers.items():
                here = {f"{key}/{n}": one for key, job in jobs.items() for n, one in job.at(name).items()}
                self.layers.setdefault(name, RowLinear(layer.base, self._now, layer.own_prompt, here))

    @contextmanager
    def attached(self) -> Iterator[None]:
        place(self.model, self.layers)
        try:
            yield
        finally:
            place(self.model, {name: layer.base for name, layer in self.layers.items()})

    @contextmanager
    def activate(
        self, rows: Sequence[tuple[Active, ...]], prompts: Mapping[str, Float[Tensor, "n c"]] | None = None
    ) -> Iterator[None]:
        """As `Adapters.activate`; adapters and prompts by `JOB/NAME`."""
        before, now = (self._now.number, self._now.rows, self._now.prompts), self._now
        now.rows, now.prompts = tuple(rows), prompts
        now.number = self._numbers.setdefault(now.rows, len(self._numbers))
        try:
            yield
        finally:
            now.number, now.rows, now.prompts = before


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
