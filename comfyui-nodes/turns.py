"""Which of two LoRAs acts where and when: K-LoRA (arXiv 2502.18461) by layer and step, LoRA Switch (arXiv 2402.16843) by step."""

from collections.abc import Mapping

import torch

from .adapters import Factors

WAYS = ("k-lora", "switch")
ALPHA, BETA = 1.5, 0.5  # K-LoRA's bar for the content: 1.5 τ + 0.5, with τ from 0 (the first step) to 1


def turns(
    way: str, content: Mapping[str, Factors], style: Mapping[str, Factors], steps: int
) -> list[tuple[dict[str, Factors], dict[str, Factors]]]:
    """For each step, the layers in which the content LoRA acts, and those in which the style LoRA does.

    `switch`: the content in steps 0, 2, …, the style in the others. `k-lora`: in a layer that both change, the content acts while
    S_c / γ > S_s (1.5 τ + 0.5). S is the sum of the r_c·r_s largest |entries| of a layer's change, γ the ratio of the sums of all
    |entries|, over the layers that both change. A layer that only one of them changes is always its own."""
    if way == "switch":
        return [({}, dict(style)) if i % 2 else (dict(content), {}) for i in range(steps)]
    common = sorted(content.keys() & style.keys())
    if not common:
        raise ValueError("the two LoRAs have no layer in common: use them together as they are.")
    sizes = {path: tuple(_sizes(one, _count(content[path], style[path])) for one in (content[path], style[path]))
             for path in common}  # fmt: skip
    gamma = sum(c[1] for c, _ in sizes.values()) / sum(s[1] for _, s in sizes.values())
    found = []
    for i in range(steps):
        bar = ALPHA * i / steps + BETA
        ours = {path for path, (c, s) in sizes.items() if c[0] / gamma > s[0] * bar}
        found.append(
            (
                {path: one for path, one in content.items() if path in ours or path not in style},
                {path: one for path, one in style.items() if path not in ours},
            )
        )
    return found


def _count(content: Factors, style: Factors) -> int:
    return len(content.down) * len(style.down)


def _sizes(factors: Factors, count: int) -> tuple[float, float]:
    """The sum of the `count` largest |entries| of a layer's change, and the sum of all."""
    change = (factors.up.float() @ factors.down.float() * factors.scale).abs().flatten()
    return float(change.topk(min(count, len(change))).values.sum()), float(change.sum())


def step_of(sigmas: torch.Tensor, sigma: float) -> int:
    """The number of the step that begins at `sigma`. `sigmas` [steps + 1]: those of the sampler, the last one 0."""
    return int((sigmas[:-1].float() - sigma).abs().argmin())
