"""Statistics of trained mergers: their means, how similar they are, and whether they collapsed."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.core.adapters import Adapters


def summary(adapters: Adapters) -> dict[str, Tensor]:
    """`mean NAME` for every adapter that has mergers, and `cos`: the mean |cos| between the mergers of two adapters,
    over layers. Empty if no adapter has mergers. The values are scalars on the adapters' device: a run computes them at
    every step and must not wait for the device."""
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
    """Layer → the merger of one adapter in that layer, `[k]`, `[r]`, `[d]` or `[1]`, on the CPU."""
    return {layer: merger.cpu() for layer, merger in _on_device(adapters, name).items()}


def _on_device(adapters: Adapters, name: str) -> dict[str, Tensor]:
    return {layer: found[0].detach() for layer, one in adapters.of(name).items() if (found := one.mergers())}


def collapsed(found: Mapping[str, Tensor]) -> bool:
    """Whether all adapters were weakened in the same way. Then the result is just the plain sum at a lower strength."""
    means = [float(value) for key, value in found.items() if key.startswith("mean ")]
    return bool(means) and max(means) < 0.5 and float(found.get("cos", 0)) > 0.8
