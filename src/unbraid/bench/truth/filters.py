"""Image filters as additional styles: with more styles per subject, the base learns to treat style separately from subject.

Every filter maps float pictures `[n, 3, h, w]` in 0..1 to pictures of the same shape.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Filter = Callable[[Tensor], Tensor]


def _grey(x: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype, device=x.device)
    return (x * weights[:, None, None]).sum(1, keepdim=True)


def _colour(hexadecimal: str, like: Tensor) -> Tensor:
    channels = [int(hexadecimal[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return torch.tensor(channels, dtype=like.dtype, device=like.device)[:, None, None]


def _ramp(value: Tensor, *colours: str) -> Tensor:
    """Map `[n, 1, h, w]` in 0..1 to a piecewise linear colour ramp."""
    spot = value.clamp(0, 1) * (len(colours) - 1)
    out = torch.zeros_like(value).expand(-1, 3, -1, -1)
    for i, colour in enumerate(colours):
        out = out + (1 - (spot - i).abs()).clamp(min=0) * _colour(colour, value)
    return out


def edges(x: Tensor) -> Tensor:
    """Strength of edges in 0..1, `[n, 1, h, w]`: the largest difference within 3×3 pixels, over all channels."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    high = F.max_pool2d(padded, 3, 1)
    low = -F.max_pool2d(-padded, 3, 1)
    return ((high - low).amax(1, keepdim=True) * 1.6 - 0.25).clamp(0, 1)


def sepia(x: Tensor) -> Tensor:
    return _ramp(_grey(x), "2b1608", "9c6b3f", "f6e7c8")


def night(x: Tensor) -> Tensor:
    return 1 - x


def pastel(x: Tensor) -> Tensor:
    return 0.55 + 0.45 * (0.6 * x + 0.4 * _grey(x))


def blueprint(x: Tensor) -> Tensor:
    return _ramp(edges(x), "14408c", "f4f8ff")


def risograph(x: Tensor) -> Tensor:
    grey = _grey(x)
    return torch.where(
        grey < 0.45, _colour("1f3fb5", x), torch.where(grey < 0.8, _colour("ff6a70", x), _colour("fbf3dd", x))
    )


def pixel(x: Tensor) -> Tensor:
    small = F.adaptive_avg_pool2d(x, 12)
    return F.interpolate(small, size=x.shape[-2:], mode="nearest")


def blurred(x: Tensor) -> Tensor:
    sigma = x.shape[-1] / 26
    radius = int(3 * sigma)
    taps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.softmax(-(taps**2) / (2 * sigma**2), 0)
    rows = kernel[None, None, :, None].expand(3, 1, -1, 1)
    soft = F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), rows, groups=3)
    return F.conv2d(F.pad(soft, (radius, radius, 0, 0), mode="replicate"), rows.transpose(2, 3), groups=3)


def comic(x: Tensor) -> Tensor:
    return (x * 4).round() / 4 * (1 - edges(x))


def noir(x: Tensor) -> Tensor:
    return ((_grey(x) - 0.5) * 2.2 + 0.45).clamp(0, 1).expand(-1, 3, -1, -1)


def neon(x: Tensor) -> Tensor:
    return edges(x) * (0.25 + 0.75 * (x / x.amax(1, keepdim=True).clamp(min=0.05)))


def emboss(x: Tensor) -> Tensor:
    grey = F.pad(_grey(x), (1, 1, 1, 1), mode="replicate")
    return (0.5 + 0.7 * (grey[..., 2:, 2:] - grey[..., :-2, :-2])).clamp(0, 1).expand(-1, 3, -1, -1)


def pencil(x: Tensor) -> Tensor:
    return (1 - 0.75 * edges(x)).expand(-1, 3, -1, -1)


def thermal(x: Tensor) -> Tensor:
    return _ramp(1 - _grey(x), "100060", "a000c0", "ff5020", "ffe030", "ffffff")


VERSION = 1  # to be raised when a filter changes: the benchmark's results depend on them
TRAIN_FILTERS: dict[str, Filter] = {
    f.__name__: f for f in (sepia, night, pastel, blueprint, risograph, pixel, blurred, comic, noir, neon)
}
HELD_OUT_FILTERS: dict[str, Filter] = {f.__name__: f for f in (emboss, pencil, thermal)}
