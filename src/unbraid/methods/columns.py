"""Column separation (UnZipLoRA, arXiv 2412.04465): which adapter owns which output channel of a layer."""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Factors
from unbraid.methods.entry import ROLES, Blocks


@dataclass(frozen=True)
class Columns:
    """Column separation: `times` periods, each opening with a scoring window and granting `ratio` of the channels."""

    steps: int
    times: int
    ratio: float
    window: int
    blocks: Blocks

    def check(self, needs_window: bool) -> None:
        if not 0 < self.ratio * self.times <= 1:
            what, fix = f"column_ratio {self.ratio} × sample_times {self.times}", "Their product may be at most 1."
            raise UsageError(what, "unziplora", fix)
        if needs_window and not 1 <= self.window <= self.period:
            what = f"window {self.window} does not fit a period of {self.period} steps"
            raise UsageError(what, "unziplora", "Shorten it.")

    @property
    def period(self) -> int:
        return ceil(self.steps / self.times)

    def scoring(self, step: int) -> bool:
        return step % self.period < self.window

    def granting(self, step: int) -> bool:
        return step % self.period == self.window - 1

    def exempt(self, layer: str) -> str | None:
        """The adapter that uses every channel of this layer, if any."""
        return next((role for role in ROLES if layer.startswith(self.blocks.get(role, ()))), None)


class Ledger(nn.Module):
    """One adapter's books on one layer's output channels, kept beside its factors so that they are saved with them.

    owned [d]: granted so far. losing [d]: contested, and the other adapter won. score [d]: importance, summed.
    """

    owned: Tensor
    losing: Tensor
    score: Tensor

    def __init__(self, like: Tensor, owned: bool) -> None:
        super().__init__()
        self.register_buffer("owned", torch.full_like(like, owned, dtype=torch.bool))
        self.register_buffer("losing", torch.zeros_like(like, dtype=torch.bool))
        self.register_buffer("score", torch.zeros_like(like))


def ledger(factors: Factors) -> Ledger:
    books = factors.ledger
    assert isinstance(books, Ledger)
    return books


def pairs(adapters: Adapters) -> dict[str, tuple[Factors, Factors]]:
    """(content, style) factors by layer."""
    content, style = (adapters.of(role) for role in ROLES)
    return {name: (one, style[name]) for name, one in content.items()}


def pieces(adapters: Adapters) -> list[tuple[Factors, Factors]]:
    """(content, style) of every stack of layers, or of every layer where nothing is packed."""
    content, style = ROLES
    return [(some[content], some[style]) for some in adapters.pieces()]


def gates(factors: Factors) -> nn.Parameter:
    assert factors.channels is not None
    return factors.channels


@torch.no_grad()
def clamp_gates(adapters: Adapters) -> None:
    for both in pieces(adapters):
        for factors in both:
            if factors.channels is not None:
                factors.channels.clamp_(0.0, 1.0)
