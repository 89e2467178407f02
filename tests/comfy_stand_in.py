"""A stand-in of the interfaces of ComfyUI that comfyui-nodes uses, on a tiny base. Noise levels ("sigmas") are times from 1 to 0."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unbraid.bases.base import Base
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import UsageError
from unbraid.files.formats.encode import kohya_name

FOLDER = Path(__file__).parent.parent / "comfyui-nodes"


@dataclass(frozen=True)
class Socket:
    """An input or an output of a schema."""

    kind: str
    id: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)


class Kind:
    def __init__(self, name: str) -> None:
        self.name = name

    def Input(self, id: str, **given: Any) -> Socket:
        return Socket(self.name, id, given)

    def Output(self) -> Socket:
        return Socket(self.name)


class Inner(nn.Module):
    """What a model patcher holds: the network, and how it is called."""

    base: Base

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.diffusion_model = base.denoiser
        self.__dict__["base"] = base

    def apply_model(self, noisy: Tensor, sigma: Tensor, prompts: list[Prompt]) -> Tensor:
        t = (sigma * self.base.process.steps).round().long()
        sizes = torch.tensor([[self.base.size, self.base.size, 0, 0, self.base.size, self.base.size]])
        return self.base.predict(noisy, t, prompts, sizes.float().expand(len(noisy), -1))


class Patcher:
    def __init__(self, model: Inner, options: Mapping[str, Any] | None = None) -> None:
        self.model, self.model_options = model, dict(options or {})

    def clone(self) -> "Patcher":
        return Patcher(self.model, self.model_options)

    def set_model_unet_function_wrapper(self, wrapper: Any) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def get_model_object(self, name: str) -> Any:
        assert name == "model_sampling"
        return SimpleNamespace(percent_to_sigma=lambda percent: 1 - percent)


def conditioning(prompt: Prompt) -> list[Any]:
    return [[prompt.embeds[None], {"prompt": prompt}]]


def calc_cond_batch(model: Inner, conds: list[Any], x: Tensor, timestep: Tensor, options: Mapping[str, Any]) -> Any:
    """The predictions under several conditionings, in one batch."""
    prompts = [cond[0][1]["prompt"] for cond in conds for _ in range(len(x))]
    noisy, sigma, k = x.repeat(len(conds), 1, 1, 1), timestep.repeat(len(conds)), len(conds)
    given = {"input": noisy, "timestep": sigma, "c": {"prompts": prompts}, "cond_or_uncond": list(range(k))}
    wrapper = options.get("model_function_wrapper", lambda apply, given: apply(noisy, sigma, **given["c"]))
    return wrapper(model.apply_model, given).unflatten(0, (k, len(x))).unbind(0)


class CFGGuider:
    def __init__(self, patcher: Patcher) -> None:
        self.model_patcher, self.inner_model = patcher, patcher.model

    def inner_set_conds(self, conds: Mapping[str, Any]) -> None:
        self.conds = dict(conds)

    def set_cfg(self, cfg: float) -> None:
        self.cfg = cfg

    def __call__(self, x: Tensor, time: float) -> Tensor:
        return self.predict_noise(x, torch.full((len(x),), time), self.model_patcher.model_options)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        conds = [self.conds["positive"], self.conds["negative"]]
        main, blank = calc_cond_batch(self.inner_model, conds, x, timestep, model_options or {})
        return blank + self.cfg * (main - blank)


def model_lora_keys_unet(model: Inner, key_map: dict[str, str]) -> dict[str, str]:
    for name, module in model.diffusion_model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            try:
                key_map[kohya_name(f"unet.{name}", "sdxl")] = f"diffusion_model.{name}.weight"
            except UsageError:  # a module that SDXL does not have
                continue
    return key_map


@contextmanager
def nodes(loras: Path) -> Iterator[Any]:
    """The package comfyui-nodes, imported with this stand-in in ComfyUI's place. `loras`: ComfyUI's folder of LoRAs."""
    kinds = {name: Kind(name.upper()) for name in ("Model", "Conditioning", "Float", "Combo", "Sigmas", "Guider")}
    io = SimpleNamespace(**kinds, Custom=Kind, Schema=SimpleNamespace, ComfyNode=object, NodeOutput=lambda *out: out)
    parts = {
        "comfy": {},
        "comfy.lora": {"model_lora_keys_unet": model_lora_keys_unet},
        "comfy.samplers": {"CFGGuider": CFGGuider, "calc_cond_batch": calc_cond_batch},
        "comfy.utils": {"load_torch_file": lambda path, safe_load: load_file(path)},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": object, "io": io},
        "folder_paths": {
            "get_filename_list": lambda kind: sorted(path.name for path in loras.iterdir()),
            "get_full_path_or_raise": lambda kind, name: str(loras / name),
        },
    }
    made = {name: ModuleType(name) for name in parts}
    for name, module in made.items():
        vars(module).update(parts[name])
        if "." in name:
            setattr(made[name.partition(".")[0]], name.rpartition(".")[2], module)
    spec = importlib.util.spec_from_file_location(
        "unbraid_nodes", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec and spec.loader
    package = importlib.util.module_from_spec(spec)
    sys.modules |= {**made, "unbraid_nodes": package}
    try:
        spec.loader.exec_module(package)
        yield sys.modules["unbraid_nodes.nodes"]
    finally:
        for name in [one for one in sys.modules if one in made or one.partition(".")[0] == "unbraid_nodes"]:
            del sys.modules[name]
