"""AdamW with its moments in 8 bits: two bytes for each trained number instead of eight, on any device."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbraid.core.adapters import Adapters
from unbraid.core.optim import Rates, groups

BLOCK = 256  # numbers that share a scale
BUCKET = 4_000_000  # numbers that are updated together: enough for few calls, few enough to need little memory


@dataclass(frozen=True)
class Code:
    """A logarithmic code: 0, and `levels` magnitudes that span `decades` decades up to the largest of the block."""

    levels: int
    decades: float
    dtype: torch.dtype

    @property
    def ratio(self) -> float:
        """The ratio of neighbouring magnitudes."""
        return 10 ** (self.decades / (self.levels - 1))

    def write(self, x: Tensor, rng: torch.Generator, least: int) -> tuple[Tensor, Tensor]:
        """x `[n]` → codes `[n]` and scales `[blocks]`. Rounding is stochastic, with mean x: otherwise a running average
        that changes by less than one level per step would never change. `least`: the smallest code for values
        that are not 0."""
        blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1)
        part = (blocks.abs() / scale.clamp_min(1e-38)[:, None]).clamp_min(1e-30)
        place = self.levels + part.log10() * ((self.levels - 1) / self.decades)
        below = place.floor().clamp(0, self.levels)
        low = torch.where(below > 0, self.ratio ** (below - self.levels), 0)
        high = self.ratio ** (below + 1 - self.levels)
        chance = torch.rand(part.shape, generator=rng, device=x.device)
        codes = (below + (chance * (high - low) < part - low)).clamp(least, self.levels) * blocks.sign()
        return codes.flatten()[: len(x)].to(self.dtype), scale

    def read(self, codes: Tensor, scale: Tensor) -> Tensor:
        code = codes.float()
        size = torch.where(code == 0, 0, self.ratio ** (code.abs() - self.levels))
        return size * code.sign() * scale.repeat_interleave(BLOCK)[: len(codes)]


MEAN, SQUARE = Code(127, 6.0, torch.int8), Code(255, 8.0, torch.uint8)


class AdamW8(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with block-wise 8-bit moments (as in arXiv 2110.02861, but with simpler codes and
    stochastic rounding).

    The update itself is exact. Only the moments that are kept for the next step are rounded. Second moments below 1e-8
    of the largest in their block are raised to that value, not rounded to 0: the step is divided by their root.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        super().__init__([dict(group) for group in groups], {"betas": betas, "eps": eps})
        self.register_load_state_dict_post_hook(_as_codes)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for bucket in _buckets(group["params"]):
                if any(p.grad is not None for p in bucket):
                    self._update(bucket, group)

    def _update(self, bucket: list[Tensor], group: Mapping[str, Any]) -> None:
        state, total = self.state[bucket[0]], sum(p.numel() for p in bucket)
        if not state:
            blocks, like = -(-total // BLOCK), bucket[0]
            state["step"] = torch.zeros(())
            for name, code in (("mean", MEAN), ("square", SQUARE)):
                state[name] = torch.zeros(total, dtype=code.dtype, device=like.device)
                state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=like.device)
        state["step"] += 1
        count = int(state["step"])
        rng = torch.Generator(bucket[0].device).manual_seed(count)  # a resumed run rounds the same way
        for begin in range(0, total, BUCKET):
            span = slice(begin, min(begin + BUCKET, total))
            some = [(p, p.grad) for p in bucket]
            if total > BUCKET:  # one large tensor
                some = [(_flat(p)[span], None if g is None else _flat(g)[span]) for p, g in some]
            self._change(some, state, span, group, count, rng)

    def _change(
        self,
        some: list[tuple[Tensor, Tensor | None]],
        state: dict[str, Any],
        span: slice,
        group: Mapping[str, Any],
        count: int,
        rng: torch.Generator,
    ) -> None:
        """The AdamW step for tensors (with their gradients) whose moments are the `span` of the state."""
        blocks, (first, second) = slice(span.start // BLOCK, -(-span.stop // BLOCK)), group["betas"]
        gradient = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in some])
        mean = MEAN.read(state["mean"][span], state["mean_scale"][blocks]).lerp_(gradient, 1 - first)
        square = SQUARE.read(state["square"][span], state["square_scale"][blocks]).lerp_(gradient.square(), 1 - second)
        size = (square / (1 - second**count)).sqrt_().add_(group["eps"])
        change = (mean / (1 - first**count)).div_(size)
        for (p, g), part in zip(some, change.split([p.numel() for p, _ in some]), strict=True):
            if g is not None:
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(part.view_as(p), alpha=group["lr"])
        state["mean"][span], state["mean_scale"][blocks] = MEAN.write(mean, rng, 0)
        state["square"][span], state["square_scale"][blocks] = SQUARE.write(square, rng, 1)


def adamw8(adapters: Adapters, rates: Rates) -> AdamW8:
    """Like `optim.adamw`, with 8-bit moments."""
    return AdamW8(groups(adapters, rates))


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for p in parameters:
        if bucket and sum(one.numel() for one in bucket) + p.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def _flat(tensor: Tensor) -> Tensor:
    """A flat view in the order of memory. (The `up` of a stack and its gradient are stored transposed.)"""
    return (tensor if tensor.is_contiguous() else tensor.mT).view(-1)


def _as_codes(optimizer: torch.optim.Optimizer) -> None:
    """Convert loaded codes back to integers. torch loads a state in the dtype of its parameter, which loses nothing
    because the codes are small whole numbers."""
    for state in optimizer.state.values():
        state["mean"], state["square"] = state["mean"].to(MEAN.dtype), state["square"].to(SQUARE.dtype)
