"""LoRAs beside a model's layers: added by forward hooks while the model is called, so they can change from call to call.

ComfyUI's own LoRA loader adds a LoRA to the weights, for all steps and all rows of a batch. Here W stays as it is, and each layer's
output gets strength · alpha / r · up · down · x on top, which is the same sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

READS_TEXT = (".attn2.to_k", ".attn2.to_v")  # the layers in which a LoRA can read a prompt of its own


@dataclass
class Factors:
    """A LoRA in one layer: scale · up [d, r] · down [r, k]. It moves to where it is used, and stays there."""

    down: Tensor
    up: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to the layer's output, `[..., d]`, for its input `[..., k]`."""
        self.down, self.up = self.down.to(x), self.up.to(x)
        return x @ self.down.T @ self.up.T * self.scale


@dataclass(frozen=True)
class Use:
    """A LoRA at a strength. `own` [1, n, c]: the text that it reads in cross-attention; by default the same as the model."""

    modules: Mapping[str, Factors]
    strength: float = 1.0
    own: Tensor | None = None


def modules_of(tensors: Mapping[str, Tensor], key_map: Mapping[str, Any], name: str) -> dict[str, Factors]:
    """Path of a layer in the model → its factors.

    `tensors`: a file with kohya's names, such as unbraid writes. `key_map`: name of a LoRA's module → key of the weight, as
    `comfy.lora.model_lora_keys_unet` gives it. Raises ValueError for what is not in the model, and for layers that are not linear."""
    found = {}
    for key in sorted(tensors):
        stem, end, _ = key.partition(".lora_down.weight")
        if not end:
            continue
        target = key_map.get(stem)
        if not isinstance(target, str):
            raise ValueError(
                f"{name}: {stem} has no layer of its own in this model. Was the LoRA made for another one?"
            )
        down, up = tensors[key], tensors[f"{stem}.lora_up.weight"]
        if down.ndim != 2 or up.ndim != 2:
            raise ValueError(f"{name}: {stem} changes a convolution. These nodes use linear layers alone.")
        alpha = tensors.get(f"{stem}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        found[target.removesuffix(".weight")] = Factors(down, up, scale)
    if not found:
        raise ValueError(f"{name}: no LoRA with kohya's names. `unbraid convert FILE OUT --to kohya` makes one.")
    return found


@contextmanager
def attached(model: nn.Module, uses: Sequence[Use], conditional: Tensor | None = None) -> Iterator[None]:
    """Add LoRAs to the layers of `model` inside the `with` block.

    `conditional` [rows]: which rows of a batch have the positive prompt; only there a LoRA reads its own text."""
    with ExitStack() as undo:
        for use in uses:
            for path, factors in use.modules.items():
                own = use.own if path.endswith(READS_TEXT) else None
                hook = _hook(factors, use.strength, own, conditional)
                undo.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        yield


def _hook(factors: Factors, strength: float, own: Tensor | None, conditional: Tensor | None) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = given[0] if own is None else _own_text(own, given[0], conditional)
        return out + strength * factors(x)

    return hook


def _own_text(own: Tensor, text: Tensor, conditional: Tensor | None) -> Tensor:
    """The text that a LoRA reads, in the shape of the model's, `[rows, n, c]`. A shorter one is repeated, as ComfyUI does."""
    times, rest = divmod(text.shape[1], own.shape[1])
    if rest or not times:
        raise ValueError(
            f"a LoRA's own prompt has {own.shape[1]} tokens, the main one {text.shape[1]}: make them equally long."
        )
    own = own.to(text).repeat(1, times, 1).expand(len(text), -1, -1)
    return own if conditional is None else torch.where(conditional.to(text.device)[:, None, None], own, text)
