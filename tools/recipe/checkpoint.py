"""Kill-safe training state: one safetensors file, written under a temporary name and renamed."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save(
    path: Path, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, rng: torch.Generator
) -> None:
    """Weights, optimiser moments, the generator's state and the step, in one file."""
    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
    tensors["rng"] = rng.get_state()
    part = path.with_suffix(".part")
    save_file({key: value.contiguous() for key, value in tensors.items()}, part, {"state": json.dumps({"step": step})})
    part.replace(path)


def load(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, rng: torch.Generator) -> int:
    """Restore what `save` wrote; returns the step, 0 if there is nothing to restore."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        step = json.loads(file.metadata()["state"])["step"]
    for name, module in modules.items():
        module.load_state_dict(
            {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
        )
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, i, what = key.split("/")
            moments.setdefault(int(i), {})[what] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    rng.set_state(tensors["rng"])
    return step
