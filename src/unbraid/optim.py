"""The optimiser over adapter parts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from unbraid.adapters import Adapters
from unbraid.errors import UsageError
from unbraid.lora import Part


@dataclass(frozen=True)
class Rate:
    """How fast one part of one adapter learns."""

    lr: float
    weight_decay: float = 0.0


Rates = Mapping[tuple[str, Part], Rate]


def adamw(adapters: Adapters, rates: Rates) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.999) with one group per (adapter, part). Parts without a rate stay as they are:
    no gradient is kept for them, no decay, no moments."""
    groups = []
    for adapter in adapters.names:
        parts: dict[Part, list[torch.nn.Parameter]] = {}
        for factors in adapters.of(adapter).values():
            for part, parameter in factors.parts():
                parameter.requires_grad_((adapter, part) in rates)
                parts.setdefault(part, []).append(parameter)
        for part, parameters in parts.items():
            rate = rates.get((adapter, part))
            if rate is not None:
                groups.append({"params": parameters, "lr": rate.lr, "weight_decay": rate.weight_decay})
    if not groups:
        raise UsageError("nothing would be trained", "rates", "Give at least one part of one adapter a rate.")
    return torch.optim.AdamW(groups, fused=True)
