"""The order in which convolutions keep their weights."""

import torch
from torch import nn


def channels_last(model: nn.Module, wanted: bool) -> None:
    """With channels last, or first. What is computed differs in rounding alone, and how long it takes by up to a quarter (docs/LOG.md)."""
    order = torch.channels_last if wanted else torch.contiguous_format
    kernel = next((p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1), None)
    if kernel is not None and not kernel.is_contiguous(memory_format=order):
        model.to(memory_format=order)  # type: ignore[call-overload]
