"""Choosing a device, and copying tensors to it."""

import psutil
import torch
from torch import Tensor

from unbraid.common.errors import UsageError


def found_device(name: str = "") -> torch.device:
    """The device of this name, or the best one if the name is empty. Raises UsageError if it does not exist."""
    try:
        device = torch.device(name or pick_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's errors for an unknown name or number
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there += ["mps"] if torch.backends.mps.is_available() else []
        fix = f"There are: {', '.join([*there, 'cpu'])}."
        raise UsageError(f"there is no device {name!r}", "--device", fix) from error
    return device


def pick_device() -> str:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process uses: of the card's memory if the device is one, else of the main memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def sent_to(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, without waiting for the device to finish its work."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
