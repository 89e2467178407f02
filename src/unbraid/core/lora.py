"""The data types of adapters and training steps: low-rank factors, active adapters, and branches.

An adapted linear layer computes, for every row of the batch,

    y = W0 x + Σ_a scale_a · g_a ⊙ B_a (n_a ⊙ A_a (m_a ⊙ x_a))

where A = down [r, k], B = up [d, r]; m = columns [k] (ZipLoRA, arXiv 2311.13600), n = ranks [r] (ZipRank) and
g = channels [d] (UnZipLoRA, arXiv 2412.04465) are the mergers; x_a is x, or the adapter's own prompt embedding
in cross-attention keys and values. No d×k matrix is ever formed.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Part = Literal["down", "up", "merger"]
Loss = Literal["prediction", "x0"]
Span = tuple[float, float]
WHOLE: Span = (0.0, 1.0)
ALL: frozenset[Part] = frozenset(("down", "up", "merger"))


@dataclass(frozen=True)
class Active:
    """One adapter that is active in a branch. `prompt` names the text that its cross-attention keys and values read
    (None: the prompt of the branch). Parts that are not in `trains` get no gradient; their values are used as they
    are. `segment`, (i, n): the branch's text has n segments of equal length, and the adapter acts on segment i of it and on
    the picture, not on the other segments. The text of the segment is then the one that `prompt` names."""

    adapter: str
    scale: float = 1.0
    merger: bool = True
    trains: frozenset[Part] = ALL
    prompt: str | None = None
    segment: tuple[int, int] | None = None


@dataclass(frozen=True)
class Noise:
    """How a branch's noisy picture is drawn. `offset`: standard deviation of one further random number per channel, which
    is added to the noise at all its positions, so that a picture's mean colour is hidden too. `part`: the part of the way
    from pure noise (0) to the picture (1) that timesteps are drawn from. Branches that share their noise or timestep do so
    if it is drawn in the same way."""

    offset: float = 0.0
    part: Span = WHOLE


@dataclass(frozen=True)
class Branch:
    """One prediction of a training step. `image` and `prompt` are role names, so a recipe does not depend on the user's
    files. The target is the prediction of the `teacher` if there is one, else the noise or velocity. The `loss` is the
    mean squared error of the prediction, or with `x0` that of the clean latent x̂_0 that the prediction implies."""

    image: str
    prompt: str
    active: tuple[Active, ...] = ()
    teacher: "Branch | None" = None
    weight: float = 1.0
    loss: Loss = "prediction"
    noise: Noise = Noise()

    def training(self, adapters: Collection[str]) -> "Branch":
        """The same pass, in which of the active adapters only these train. The others act."""
        return replace(
            self,
            active=tuple(one if one.adapter in adapters else replace(one, trains=frozenset()) for one in self.active),
        )


@dataclass(frozen=True)
class Lora:
    """The low-rank change of one module's weight: alpha / r · up @ down, times a strength that is given elsewhere.
    For a convolution, both tensors have kernel dimensions."""

    down: Float[Tensor, "r k *kernel"]
    up: Float[Tensor, "d r *ones"]
    alpha: float


class Fixed(nn.Module):
    """The frozen part of one adapter's factors (Break-for-Make): its values, and masks of the entries that are trained.
    In down these are some ranks and columns, in up some ranks and rows. Elsewhere the trained part is 0."""

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
        """Set the entries of the trained part, or of its gradient, that are not trained to 0."""
        return (
            down * (self.down_ranks[..., :, None] * self.columns[..., None, :]),
            up * (self.rows[..., :, None] * self.up_ranks[..., None, :]),
        )

    def complete(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The whole factors: the frozen values plus the trained part."""
        free_down, free_up = self.free(down, up)
        return self.down + free_down, self.up + free_up


@dataclass(frozen=True)
class Place:
    """Where the factors of a layer are stored: in `stack`, at `index` of its first dimension."""

    stack: "Factors"
    index: int


class Factors(nn.Module):
    """What one adapter adds to one layer. In a stack, it is what the adapter adds to each of several layers, and the
    first dimension of every tensor is the layer. Mergers, mask and fixed part exist only if a method needs them."""

    mask: Tensor | None  # [*layers, d], 0 or 1, multiplies g

    def __init__(self, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = scale  # alpha / r
        self.columns: nn.Parameter | None = None  # m, [*layers, k]
        self.ranks: nn.Parameter | None = None  # n, [*layers, r]
        self.channels: nn.Parameter | None = None  # g, [*layers, d], or [*layers, 1]: one gate for the whole layer
        self.register_buffer("mask", None)
        self.fixed: Fixed | None = None
        self.place: Place | None = None

    def gradient(self, tensor: Literal["down", "up", "channels"]) -> Tensor:
        """The gradient of one tensor of this layer. If the factors are packed, it is read from the stack."""
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
        """g · mask `[*layers, d]`, or None if there are neither gates nor a mask."""
        if self.mask is None or channels is None:
            return channels if self.mask is None else self.mask
        return channels * self.mask

    def plain(self, trains: frozenset[Part] = ALL) -> tuple[Tensor, Tensor]:
        """A and B, without mergers. Parameters that are not in `trains` are detached."""
        down: Tensor = self.down if "down" in trains else self.down.detach()
        up: Tensor = self.up if "up" in trains else self.up.detach()
        return self.fixed.complete(down, up) if self.fixed else (down, up)

    def folded(self, gates: bool = True) -> Lora:
        """The same change as plain factors with alpha = r: diag(n) A diag(m), [r, k], and diag(g · mask) B, [d, r].
        No d×k matrix is formed. Without `gates`, g is left out. The result is always on the CPU, because the code for
        files and merges does not handle devices."""
        with torch.no_grad():
            down, up = self.plain()
            gate = self.gate(self.channels if gates else None)
            down = down if self.columns is None else down * self.columns
            down = down if self.ranks is None else down * self.ranks[:, None]
            up = up if gate is None else up * gate[:, None]
            up = (up * self.scale).contiguous()
            return Lora(down.to("cpu", copy=True), up.to("cpu", copy=True), float(len(self.down)))
