"""What an adapter is, and what a step is made of: factors, who is active, and branches.

An adapted linear layer computes, for every row of the batch,

    y = W0 x + Σ_a scale_a · g_a ⊙ B_a (n_a ⊙ A_a (m_a ⊙ x_a))

where A = down [r, k], B = up [d, r]; m = columns [k] (ZipLoRA, arXiv 2311.13600), n = ranks [r] (ZipRank) and
g = channels [d] (UnZipLoRA, arXiv 2412.04465) are the mergers; x_a is x, or the adapter's own prompt embedding
in cross-attention keys and values. No d×k matrix is ever formed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Part = Literal["down", "up", "merger"]
ALL: frozenset[Part] = frozenset(("down", "up", "merger"))


@dataclass(frozen=True)
class Active:
    """One adapter at work in a branch. `prompt` names the text that its cross-attention keys and values
    read (none: the branch's own). Parts that are not in `trains` get no gradient, only their values count."""

    adapter: str
    scale: float = 1.0
    merger: bool = True
    trains: frozenset[Part] = ALL
    prompt: str | None = None


@dataclass(frozen=True)
class Branch:
    """One prediction of a training step; `image` and `prompt` are role names, so a recipe does not depend on
    the user's files. With a `teacher`, its prediction is the target; without, the noise or velocity is."""

    image: str
    prompt: str
    active: tuple[Active, ...] = ()
    teacher: "Branch | None" = None
    weight: float = 1.0


@dataclass(frozen=True)
class Lora:
    """One module's low-rank change: alpha / r · up @ down (times a strength); of a convolution, with kernels."""

    down: Float[Tensor, "r k *kernel"]
    up: Float[Tensor, "d r *ones"]
    alpha: float


class Fixed(nn.Module):
    """The part of one adapter's factors that is given (Break-for-Make): its values, and where the trained part may be other
    than 0: in some ranks and columns of down, in some ranks and rows of up."""

    down: Tensor  # [*layers, r, k]
    up: Tensor  # [*layers, d, r]
    down_ranks: Tensor  # [*layers, r], 0 or 1
    columns: Tensor  # [*layers, k]
    up_ranks: Tensor  # [*layers, r]
    rows: Tensor  # [*layers, d]

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, value)

    def free(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """What of a trained part, or of its gradient, counts."""
        return (
            down * (self.down_ranks[..., :, None] * self.columns[..., None, :]),
            up * (self.rows[..., :, None] * self.up_ranks[..., None, :]),
        )

    def complete(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Trained parts → factors."""
        free_down, free_up = self.free(down, up)
        return self.down + free_down, self.up + free_up


@dataclass(frozen=True)
class Place:
    """Where a layer's factors lie: which of the layers of a stack they are."""

    stack: "Factors"
    index: int


class Factors(nn.Module):
    """What one adapter adds to one layer, or, in a stack, to each of several: then every tensor has a dimension of layers in front.
    The mergers, the mask and the fixed part exist only when a method asks for them."""

    mask: Tensor | None  # [*layers, d], 0 or 1, multiplies g

    def __init__(self, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = scale  # alpha / r
        self.columns: nn.Parameter | None = None  # m, [*layers, k]
        self.ranks: nn.Parameter | None = None  # n, [*layers, r]
        self.channels: nn.Parameter | None = None  # g, [*layers, d], or 1 in place of d for the whole layer
        self.register_buffer("mask", None)
        self.fixed: Fixed | None = None
        self.place: Place | None = None

    def gradient(self, tensor: Literal["down", "up", "channels"]) -> Tensor:
        """Of one of its tensors, here or in the stack."""
        found = getattr(self.place.stack if self.place else self, tensor).grad
        assert found is not None
        return found[self.place.index] if self.place else found

    def mergers(self) -> list[nn.Parameter]:
        return [merger for merger in (self.columns, self.ranks, self.channels) if merger is not None]

    def parts(self) -> Iterator[tuple[Part, nn.Parameter]]:
        yield "down", self.down
        yield "up", self.up
        for merger in self.mergers():
            yield "merger", merger

    def gate(self, channels: Tensor | None) -> Tensor | None:
        """g · mask, or None where every channel is simply on."""
        if self.mask is None or channels is None:
            return channels if self.mask is None else self.mask
        return channels * self.mask

    def plain(self, trains: frozenset[Part] = ALL) -> tuple[Tensor, Tensor]:
        """A and B, without mergers; what does not train is detached as a parameter."""
        down: Tensor = self.down if "down" in trains else self.down.detach()
        up: Tensor = self.up if "up" in trains else self.up.detach()
        return self.fixed.complete(down, up) if self.fixed else (down, up)

    def folded(self, gates: bool = True) -> Lora:
        """The same change as plain factors, alpha = r: diag(n) A diag(m), [r, k], and diag(g · mask) B, [d, r], so that no d×k matrix is
        formed. Without `gates`, g is left out. On the CPU, wherever it trained: nothing that files and merges do knows devices."""
        with torch.no_grad():
            down, up = self.plain()
            gate = self.gate(self.channels if gates else None)
            down = down if self.columns is None else down * self.columns
            down = down if self.ranks is None else down * self.ranks[:, None]
            up = up if gate is None else up * gate[:, None]
            up = (up * self.scale).contiguous()
            return Lora(down.to("cpu", copy=True), up.to("cpu", copy=True), float(len(self.down)))
