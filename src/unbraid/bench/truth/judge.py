"""The judge: a small network that embeds what is drawn (content) and how it is drawn (style).

The benchmark measures with it. `tools/recipe/judge.py` trains it on real icons only, `tools/judge_validation.py` validates it,
docs/judge.md has the figures.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.common.interrupts import interrupts_kept

SIZE = 128  # pixels; pictures of other sizes are resized
WEIGHTS = Path(__file__).with_name("judge.safetensors")
CHANNELS = (16, 32, 64, 128, 256)
LAYOUT = 48  # channels of the 4×4 map that the content head reads
BINS = 6  # soft bins of each colour channel, and of the local contrast
PALETTE = 64  # learnt combinations of colour and contrast, whose frequency the style head reads


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(inner)))


def _halve(narrow: int, wide: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU())


def _contrast(x: Tensor) -> Tensor:
    """Logarithm of the difference to the next pixels, 0 (flat, below 1/255) to 1 (an edge): `[n, 1, h, w]`."""
    right, below = F.pad(x[..., 1:] - x[..., :-1], (0, 1)), F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
    return ((right.abs() + below.abs()).amax(1, keepdim=True) * 255 + 1).log() / 6.24


def _binned(x: Tensor) -> Tensor:
    """Soft (triangular) bins of values in 0..1: `[n, c, h, w]` to `[n, c·BINS, h, w]`."""
    centres = torch.linspace(0, 1, BINS, device=x.device)[:, None, None]
    return (1 - (x[:, :, None] - centres).abs() * (BINS - 1)).clamp(min=0).flatten(1, 2)


class Judge(nn.Module):
    """Two unit-norm embeddings of a picture: content (blind to style) and style (blind to subject).

    The style head reads statistics of every stage's features and a learnt histogram of colours and contrasts: it has no access to
    the layout. The content head reads the last 4×4 map.
    """

    def __init__(self, content: int = 128, style: int = 64) -> None:
        super().__init__()
        first, last = CHANNELS[0], CHANNELS[-1]
        deeper = (nn.Sequential(_halve(a, b), _Residual(b)) for a, b in pairwise(CHANNELS))
        self.stages = nn.ModuleList([_halve(4, first), *deeper])
        self.layout = nn.Conv2d(last, LAYOUT, 1)
        self.content = nn.Sequential(nn.BatchNorm1d(last + 16 * LAYOUT), nn.Linear(last + 16 * LAYOUT, content))
        cells = nn.Conv2d(4 * BINS, 48, 1)
        self.palette = nn.Sequential(cells, nn.ReLU(), nn.Conv2d(48, PALETTE, 1), nn.ReLU())
        statistics = 2 * sum(CHANNELS) + PALETTE
        hidden = nn.Sequential(nn.Linear(statistics, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU())
        self.style = nn.Sequential(nn.BatchNorm1d(statistics), hidden, nn.Linear(128, style))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiable: pictures `[n, 3, SIZE, SIZE]` in 0..1 to content `[n, 128]`, style `[n, 64]`, unit norm."""
        x = torch.cat([pictures, _contrast(pictures)], 1)
        statistics = [self.palette(_binned(x[..., 1::3, 1::3])).mean((2, 3))]
        x = x * 2 - 1
        for stage in self.stages:
            x = stage(x)
            variance, mean = torch.var_mean(x, (2, 3), correction=0)
            statistics += [mean, (variance + 1e-5).sqrt()]
        content = self.content(torch.cat([x.mean((2, 3)), self.layout(x).flatten(1)], 1))
        style = self.style(torch.cat(statistics, 1))
        return F.normalize(content), F.normalize(style)

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Float pictures `[n, 3, h, w]` in 0..1, any size, to content `[n, 128]` and style `[n, 64]`, unit norm."""
        if pictures.shape[-2:] != (SIZE, SIZE):
            pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
        parts = [self._seen_twice(part) for part in pictures.clamp(0, 1).split(128)]
        return torch.cat([content for content, _ in parts]), torch.cat([style for _, style in parts])

    def _seen_twice(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Content is the mean over the picture and the picture at three quarters of its size, because icon sets leave margins of different
        width."""
        content, style = self(pictures)
        small = F.interpolate(pictures, 3 * SIZE // 4, mode="bilinear", antialias=True)
        distant, _ = self(F.pad(small, (SIZE // 8,) * 4, mode="replicate"))
        return F.normalize(content + distant), style


def load_judge(path: Path | None = None) -> Judge:
    """The committed judge, or the one at `path`: fp32, in evaluation mode, not trainable.

    Raises UsageError when the file is missing, damaged, or holds another network.
    """
    path = path or WEIGHTS
    fix = "Restore it from the repository, or train it there: python -m tools.recipe judge --work DIR"
    if not path.is_file():
        raise UsageError("the judge's weights are missing", path, fix)
    judge = Judge()
    try:
        with interrupts_kept():
            tensors = load_file(path)
        judge.load_state_dict({key: t.float() if t.is_floating_point() else t for key, t in tensors.items()})
    except (SafetensorError, RuntimeError) as error:  # load_state_dict raises RuntimeError for other keys or shapes
        raise UsageError("the judge's weights cannot be read", path, fix) from error
    return judge.eval().requires_grad_(False)


def save_judge(judge: Judge, path: Path = WEIGHTS) -> None:
    """Write the weights in fp16."""
    state = {key: t.half() if t.is_floating_point() else t for key, t in judge.state_dict().items()}
    save_file({key: t.contiguous() for key, t in state.items()}, path)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of the rows of `a` and `b`, `[n, d]` each: `[n]` in -1..1."""
    return F.cosine_similarity(a, b, dim=-1)


def retrieval_top1(
    queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor, barred: Tensor | None = None
) -> float:
    """Share of `queries [q, d]` whose nearest row of `gallery [g, d]` has the same label; both unit norm.

    `barred`, bool `[q, g]`: rows that are excluded for a query, such as itself.
    """
    scores = queries @ gallery.T
    if barred is not None:
        scores = scores.masked_fill(barred, -torch.inf)
    return (gallery_labels[scores.argmax(1)] == query_labels).double().mean().item()


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive has a higher score than a negative, ties counting half; `scores [n]`, `positive` bool `[n]`."""
    wins, negatives = scores[positive].contiguous(), scores[~positive].sort().values
    below = torch.searchsorted(negatives, wins).double()
    not_above = torch.searchsorted(negatives, wins, right=True).double()
    return ((below + not_above) / 2).mean().item() / len(negatives)
