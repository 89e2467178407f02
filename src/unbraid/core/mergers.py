"""What a training made of its mergers: their means, how alike they are, and whether they collapsed."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.core.adapters import Adapters


def summary(adapters: Adapters) -> dict[str, Tensor]:
    """`mean NAME` for every adapter that has mergers, and `cos`: the mean |cos| between two adapters' mergers over
    layers. Empty where nothing has mergers. Scalars on the adapters' device: a run asks at every step, and does not wait."""
    found = {name: _on_device(adapters, name) for name in adapters.names}
    out = {f"mean {name}": torch.cat(list(one.values())).mean() for name, one in found.items() if one}
    alike = defaultdict[int, list[tuple[Tensor, Tensor]]](list)
    for first, second in combinations(found.values(), 2):
        for layer in first.keys() & second.keys():
            if len(first[layer]) == len(second[layer]) > 1:
                alike[len(first[layer])].append((first[layer], second[layer]))
    cosines = [
        F.cosine_similarity(*(torch.stack(side) for side in zip(*both, strict=True)), dim=1) for both in alike.values()
    ]
    return out | ({"cos": torch.cat(cosines).abs().mean()} if cosines else {})


def values(adapters: Adapters, name: str) -> dict[str, Tensor]:
    """Layer → the merger of one adapter there, `[k]`, `[r]`, `[d]` or `[1]`."""
    return {layer: merger.cpu() for layer, merger in _on_device(adapters, name).items()}


def _on_device(adapters: Adapters, name: str) -> dict[str, Tensor]:
    return {layer: found[0].detach() for layer, one in adapters.of(name).items() if (found := one.mergers())}


def collapsed(found: Mapping[str, Tensor]) -> bool:
    """Both weakened alike, so that what came out is the plain sum at less strength."""
    means = [float(value) for key, value in found.items() if key.startswith("mean ")]
    return bool(means) and max(means) < 0.5 and float(found.get("cos", 0)) > 0.8
