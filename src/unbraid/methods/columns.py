"""Column separation (UnZipLoRA, arXiv 2412.04465): each output channel of a layer is assigned to one of the adapters."""

from dataclasses import dataclass
from math import ceil, floor

import torch
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Factors
from unbraid.core.selectors import selects
from unbraid.methods.entry import ROLES, Blocks


@dataclass(frozen=True)
class Columns:
    """The schedule of column separation. Training has `times` periods. Each begins with `window` steps in which channels
    are scored; after them, each adapter is granted a share `ratio` of the channels."""

    steps: int
    times: int
    ratio: float
    window: int
    blocks: Blocks

    def check(self, needs_window: bool) -> None:
        """Raise UsageError if more channels than there are would be granted, or the window does not fit the period."""
        if not 0 < self.ratio * self.times <= 1:
            what = f"column_ratio {self.ratio} does not fit {self.times} periods (sample_times)"
            raise UsageError(what, "unziplora", f"Give column_ratio={most_ratio(self.times)} or less, but not 0.")
        if needs_window and not 1 <= self.window <= self.period:
            what = f"window {self.window} does not fit a period of {self.period} steps (steps / sample_times)"
            raise UsageError(what, "unziplora", f"Give window={self.period} or less, or leave it out.")

    @property
    def period(self) -> int:
        """The length of a period in steps."""
        return ceil(self.steps / self.times)

    def scoring(self, step: int) -> bool:
        """Whether channels are scored in this step."""
        return step < self.steps and step % self.period < self.window

    def granting(self, step: int) -> bool:
        """Whether channels are granted after this step."""
        return step < self.steps and step % self.period == self.window - 1

    def exempt(self, layer: str) -> str | None:
        """The adapter that uses every channel of this layer, if any."""
        return next((role for role in ROLES if selects(self.blocks.get(role, ()), layer)), None)


def most_ratio(times: int) -> float:
    """The largest share of the channels that can be granted in each of so many periods, rounded down."""
    return floor(1e4 / times) / 1e4


class Ledger(nn.Module):
    """The state of one layer's output channels for one adapter. It is a submodule of the factors, so it is saved with them.

    owned [d]: channels granted so far. losing [d]: channels that both adapters use and the other one won. score [d]:
    importance, summed over the window.
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
    """The ledger of an adapter's factors."""
    found = factors.ledger
    assert isinstance(found, Ledger)
    return found


def pairs(adapters: Adapters) -> dict[str, tuple[Factors, Factors]]:
    """Layer → the factors of the content and of the style adapter."""
    content, style = (adapters.of(role) for role in ROLES)
    return {name: (one, style[name]) for name, one in content.items()}


def pieces(adapters: Adapters) -> list[tuple[Factors, Factors]]:
    """The (content, style) factors of every stack of layers, or of every layer if nothing is packed."""
    content, style = ROLES
    return [(some[content], some[style]) for some in adapters.pieces()]


def gates(factors: Factors) -> nn.Parameter:
    """The trained gates g, `[*layers, d]`, of factors that have them."""
    assert factors.channels is not None
    return factors.channels


@torch.no_grad()
def clamp_gates(adapters: Adapters) -> None:
    """Keep all gates between 0 and 1."""
    for both in pieces(adapters):
        for factors in both:
            if factors.channels is not None:
                factors.channels.clamp_(0.0, 1.0)
