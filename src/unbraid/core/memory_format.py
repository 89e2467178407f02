"""The memory format of convolution weights."""

import torch
from torch import nn


def channels_last(model: nn.Module, wanted: bool) -> None:
    """Store the weights with channels last if `wanted`, else with channels first. The results differ only by rounding,
    the time by up to a quarter (docs/LOG.md)."""
    order = torch.channels_last if wanted else torch.contiguous_format
    kernel = next((p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1), None)
    if kernel is not None and not kernel.is_contiguous(memory_format=order):
        model.to(memory_format=order)  # type: ignore[call-overload]
