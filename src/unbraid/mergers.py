"""What a training made of its mergers: their means, how alike they are, and whether they collapsed."""

from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.adapters import Adapters


def summary(adapters: Adapters) -> dict[str, float]:
    """`mean NAME` for every adapter that has mergers, and `cos`: the mean |cos| between two adapters' mergers over
    layers. Empty where nothing has mergers."""
    found = {name: values(adapters, name) for name in adapters.names}
    out = {f"mean {name}": float(torch.cat(list(one.values())).mean()) for name, one in found.items() if one}
    cosines = [
        F.cosine_similarity(first[layer], second[layer], dim=0).abs()
        for first, second in combinations(found.values(), 2)
        for layer in first.keys() & second.keys()
        if len(first[layer]) == len(second[layer]) > 1
    ]
    return out | ({"cos": float(torch.stack(cosines).mean())} if cosines else {})


def values(adapters: Adapters, name: str) -> dict[str, Tensor]:
    """Layer → the merger of one adapter there, `[k]`, `[r]`, `[d]` or `[1]`."""
    return {
        layer: factors.mergers()[0].detach().cpu() for layer, factors in adapters.of(name).items() if factors.mergers()
    }


def collapsed(found: Mapping[str, float]) -> bool:
    """Both weakened alike, so that what came out is the plain sum at less strength."""
    means = [value for key, value in found.items() if key.startswith("mean ")]
    return bool(means) and max(means) < 0.5 and found.get("cos", 0) > 0.8
