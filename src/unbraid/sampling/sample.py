"""Sampling with diffusers' own pipelines, where a guidance formula is a weighted sum of passes of the denoiser.

`Guided` replaces a pipeline's denoiser. The pipeline runs at guidance 1, and `Guided` returns Σ weight · prediction
over its terms, with all passes in one batch. So every scheduler and every pipeline works with every formula.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf, nextafter
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unbraid.bases.base import Base
from unbraid.bases.compiling import uncompiled
from unbraid.bases.families.family import Prompt
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active
from unbraid.core.memory_format import channels_last
from unbraid.sampling.canvas import Canvas

NEGATIVE = "negative"  # the role of the negative prompt


@dataclass(frozen=True)
class Term:
    """One pass of a guidance formula: its weight, its prompt's role and its adapters.

    It counts at times from `t_max` down to `t_min`, both included. Times run from 1 (pure noise) to 0."""

    weight: float
    prompt: str
    active: tuple[Active, ...] = ()
    t_max: float = 1.0
    t_min: float = 0.0


@dataclass(frozen=True)
class Style:
    """One style in style guidance: its adapter, the role of its prompt, and its weight w_L (`scale`).

    `start`: the time from which on it counts (1: at all steps; 0.8: as published)."""

    active: Active
    prompt: str
    scale: float
    start: float = 1.0


def style_guidance(
    scale: float, prompt: str, styles: Sequence[Style], active: tuple[Active, ...] = (), negative: str = NEGATIVE
) -> tuple[Term, ...]:
    """Style guidance (arXiv 2405.01536, Eq. 10 and 11): e_u + w (e_c - e_u) + Σ w_i (e_i - e_c).

    It is computed as (1 - w) e_u + (w - Σ w_i) e_c + Σ w_i e_i, so e_c needs no pass where w = Σ w_i. e_u, e_c and e_i
    are the predictions under `negative`, `prompt` and each style's own prompt. The `active` adapters are on in all
    three; those with their own prompt get the negative prompt in e_u instead."""
    blank = tuple(replace(one, prompt=negative) if one.prompt else one for one in active)
    edges = sorted({1.0, *(style.start for style in styles if style.start > 0)}, reverse=True)
    out: list[Term] = []
    for high, low in zip(edges, [*edges[1:], 0.0], strict=True):
        window = {"t_max": high, "t_min": nextafter(low, inf) if low else 0.0}
        now = [style for style in styles if style.start >= high and style.scale]
        weights = {negative: 1 - scale}
        weights[prompt] = weights.get(prompt, 0.0) + scale - sum(style.scale for style in now)
        out += [Term(w, role, active if role == prompt else blank, **window) for role, w in weights.items() if w]
        out += [Term(style.scale, style.prompt, (*active, style.active), **window) for style in now]
    return tuple(out)


def classifier_free(scale: float, prompt: str, active: tuple[Active, ...] = ()) -> tuple[Term, ...]:
    """e_u + w (e_c - e_u) (arXiv 2207.12598). Adapters with their own prompt get the negative prompt in e_u."""
    return style_guidance(scale, prompt, (), active)


class Guided(nn.Module):
    """A stand-in for `base.denoiser` that evaluates a guidance formula."""

    def __init__(
        self, base: Base, terms: Sequence[Term], prompts: Mapping[str, Prompt], adapters: Adapters | None
    ) -> None:
        super().__init__()
        self.base, self.terms, self.prompts, self.adapters = base, tuple(terms), prompts, adapters
        self.dtype, self.device = base.dtype, base.device
        self.graphs = base.new_graphs()
        self.imitate(masked=False)

    def imitate(self, masked: bool) -> None:
        """Take over the attributes that pipelines read from the denoiser."""
        self.__dict__.update(self.base.family.network.stand_in(self.base.denoiser, masked))

    def forward(self, *args: Any, **given: Any) -> tuple[Any]:
        """The answer to a pipeline's call of its denoiser. The pipeline's own prompt embeddings are ignored."""
        network = self.base.family.network
        return network.returned(self.at(*network.received(args, given), given))

    def at(self, sample: Tensor, timestep: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The guided prediction for `sample` [b, c, h, w], in its shape.

        `given` has SDXL's size numbers and may have residuals of a ControlNet that ran with the pre-hook `ask_control`:
        these have one row per term and picture."""
        terms = self.counting(timestep)
        residuals = self._residuals(given)
        t = torch.as_tensor(timestep, device=sample.device)
        inputs = [sample, t, self._sizes(sample, len(terms), given), *_flat(residuals)]
        if self.graphs is None:
            return self._predict(terms, residuals, *inputs)
        keep = lambda: (self.base.embeddings.copy(), self.adapters and self.adapters.constants())  # noqa: E731
        key = (tuple(terms), tuple((name, len(_flat({name: one}))) for name, one in residuals.items()))
        return self.graphs(key, lambda *static: self._predict(terms, residuals, *static), inputs, keep=keep)

    def _predict(
        self,
        terms: Sequence[Term],
        residuals: Mapping[str, Any],
        sample: Tensor,
        t: Tensor,
        sizes: Tensor,
        *more: Tensor,
    ) -> Tensor:
        """Σ weight · prediction, `[b, c, h, w]`. `more`: the tensors of `residuals`, as `_flat` lists them."""
        b, k = len(sample), len(terms)
        rows = [term for term in terms for _ in range(b)]
        roles = {role: prompt.embeds for role, prompt in self.prompts.items()}
        activity = self.adapters.activate([row.active for row in rows], roles) if self.adapters else nullcontext()
        with activity:
            prompts, extra = [self.prompts[row.prompt] for row in rows], _like(residuals, more)
            out = self.base.predict(sample.repeat(k, 1, 1, 1), t.expand(k * b), prompts, sizes, **extra)
        parts = [part * term.weight for part, term in zip(out.unflatten(0, (k, b)), terms, strict=True)]
        return torch.stack(parts).sum(0)

    def _residuals(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: given[name] for name in self.base.family.network.residuals if given.get(name) is not None}

    def counting(self, timestep: Tensor) -> list[Term]:
        """The terms that count at a timestep."""
        time = self.base.process.time(timestep)
        return [term for term in self.terms if term.weight and term.t_min <= time <= term.t_max]

    def ask_control(
        self, control: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook for a pipeline's ControlNet, so that it runs for every term, under that term's prompt.

        The stock pipelines do the same for the two passes of plain guidance."""
        (sample, timestep), terms = args, self.counting(args[1])
        k, prompts = len(terms), [self.prompts[term.prompt] for term in terms for _ in range(len(sample))]
        conditions = self.base.conditions(prompts, self._sizes(sample, k, given))
        given |= {**conditions, "controlnet_cond": given["controlnet_cond"].repeat(k, 1, 1, 1)}
        return (sample.repeat(k, 1, 1, 1), timestep), given

    def _sizes(self, sample: Tensor, k: int, given: Mapping[str, Any]) -> Tensor:
        """SDXL's size numbers `[k b, 6]`: those that the pipeline gives for each of b pictures, repeated k times."""
        sizes = self.base.family.network.picture_sizes(given)
        return sample.new_zeros(k * len(sample), 6) if sizes is None else sizes[: len(sample)].repeat(k, 1)


def _flat(residuals: Mapping[str, Any]) -> list[Tensor]:
    """All tensors of the residuals in one list. Each residual is one tensor or several."""
    return [one for some in residuals.values() for one in ((some,) if isinstance(some, Tensor) else some)]


def _like(residuals: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The inverse of `_flat`: `tensors` in the structure of `residuals`."""
    rest = iter(tensors)
    return {k: next(rest) if isinstance(v, Tensor) else tuple(next(rest) for _ in v) for k, v in residuals.items()}


@torch.no_grad()
def generate(
    base: Base,
    terms: Sequence[Term],
    prompts: Mapping[str, Prompt],
    adapters: Adapters | None = None,
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    canvas: Canvas | None = None,
) -> list[Image.Image]:
    """One image per seed. A seed gives the same image, whatever other seeds are in the batch."""
    canvas = canvas or Canvas(base.pipe, {"height": base.size, "width": base.size})
    channels_last(base.denoiser, False)
    pipe, guided = copy.copy(canvas.pipe), Guided(base, terms, prompts, adapters)
    setattr(pipe, base.family.network.part, guided)
    guided.imitate(masked="mask_image" in canvas.given)
    given = base.family.network.prompt_arguments(prompts[terms[-1].prompt], len(seeds))
    control = getattr(pipe, "controlnet", None)
    hook = control.register_forward_pre_hook(guided.ask_control, with_kwargs=True) if control else None
    home = base.vae.device  # during training the VAE is not on the accelerator
    base.vae.to(base.device)  # type: ignore[arg-type]
    try:
        with uncompiled(base.denoiser):
            done = pipe(
                **given,
                **canvas.given,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            )
    finally:
        if guided.graphs and guided.graphs.reason:
            warnings.warn(f"drawing runs one kernel at a time: {guided.graphs.reason}", stacklevel=2)
        base.vae.to(home)  # type: ignore[arg-type]
        if hook:
            hook.remove()
    return done.images
