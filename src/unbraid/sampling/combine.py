"""Ways to combine LoRAs in a picture that no weighted sum of files can express: by turns over steps or layers, in parts of
the steps, or against other LoRAs.

All of them are guidance terms that count in a range of times (`unbraid.sampling.sample.Term`). The model needs no
hooks, and every scheduler works.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any, Literal

import torch

from unbraid.bases.families.family import Network
from unbraid.common.errors import UsageError
from unbraid.core.lora import Active, Lora
from unbraid.core.lowrank import delta
from unbraid.sampling.sample import Term, classifier_free

Combine = Literal["sum", "switch", "composite", "k-lora", "k-lora-released", "est-lora"]
ALPHA = 1.5  # how fast K-LoRA's bar for the content rises, arXiv 2502.18461


def composite(guidance: float, prompt: str, actives: Sequence[Active]) -> tuple[Term, ...]:
    """LoRA Composite (arXiv 2402.16843): each LoRA makes a guided prediction of its own, and their mean is used."""
    terms = [term for one in actives for term in classifier_free(guidance, prompt, (one,))]
    return tuple(replace(term, weight=term.weight / len(actives)) for term in terms)


def switch(guidance: float, prompt: str, actives: Sequence[Active], times: Sequence[float]) -> tuple[Term, ...]:
    """LoRA Switch (arXiv 2402.16843): one LoRA per step, in turn. `times`: see `scheduled`."""
    return scheduled(guidance, prompt, [(actives[i % len(actives)],) for i in range(len(times))], times)


@dataclass(frozen=True)
class Rule:
    """How a module is given to the content or to the style LoRA at a time τ from 0 (the first step) to 1.

    The content LoRA has it while S_c / γ > S_s · s(τ), with s(τ) = 1.5 τ + β, taken modulo 1.5 if the rule `wraps`. γ is the
    ratio of the sizes of all common modules, content to style. `top`: S is the sum of the r_c·r_s largest |entries| of ΔW
    (r_c, r_s: the two ranks), and a size is the sum of all |entries|; else both are the squared norm of ΔW."""

    beta: float
    wraps: bool = False
    top: bool = True

    def content(self, c: float, s: float, time: float) -> bool:
        """Whether the content LoRA has a module with S_c / γ = `c` and S_s = `s`."""
        bar = ALPHA * time + self.beta
        return c > s * (bar % ALPHA if self.wraps else bar)

    def sizes(self, lora: Lora, count: int) -> tuple[float, float]:
        """S of one module, and its size for γ."""
        entries = delta(lora).abs().flatten()
        if not self.top:
            return (square := float(entries.square().sum())), square
        return float(entries.topk(min(count, len(entries))).values.sum()), float(entries.sum())


RULES = {
    "k-lora": Rule(beta=0.5),  # as in the paper, arXiv 2502.18461
    "k-lora-released": Rule(beta=1.275, wraps=True),  # the default of the authors' program, which calls it s*
    "est-lora": Rule(beta=0.5, wraps=True, top=False),  # arXiv 2508.02165, whose β depends on pictures of both LoRAs
}


def choices(
    rule: Rule, content: Mapping[str, Lora], style: Mapping[str, Lora], steps: int
) -> dict[str, tuple[bool, ...]]:
    """Module → whether the content LoRA has it, for each step; else the style LoRA has it. A module that only one LoRA has
    is always its own. Raises UsageError if the LoRAs have no module in common."""
    found: dict[str, tuple[float, float]] = {}
    totals = [0.0, 0.0]
    for name in content.keys() & style.keys():
        count = len(content[name].down) * len(style[name].down)
        (c, all_c), (s, all_s) = (rule.sizes(lora[name], count) for lora in (content, style))
        found[name], totals = (c, s), [totals[0] + all_c, totals[1] + all_s]
    if not found or not all(totals):
        raise UsageError("the LoRAs have no module in common", "combine", "Use them together as they are.")
    gamma = totals[0] / totals[1]
    times = [i / steps for i in range(steps)]
    turns = {name: tuple(rule.content(c / gamma, s, time) for time in times) for name, (c, s) in found.items()}
    mine = dict.fromkeys(content.keys() - style.keys(), (True,) * steps)
    return turns | mine | dict.fromkeys(style.keys() - content.keys(), (False,) * steps)


def by_choice(
    formula: tuple[float, str],
    rule: Rule,
    actives: Sequence[Active],
    loras: Sequence[Mapping[str, Lora]],
    times: Sequence[float],
) -> tuple[dict[str, dict[str, Lora]], tuple[Term, ...]]:
    """Divide a content and a style LoRA into adapters of the modules that are used in the same steps.

    `formula`: guidance scale and prompt. `times`: see `by_step`. Returns the adapters, name → module → factors, and the
    guidance terms that use them."""
    if len(loras) != 2:
        raise UsageError(f"{len(loras)} LoRAs", "combine", "Give two: a content LoRA, then a style LoRA.")
    parts: dict[str, dict[str, Lora]] = defaultdict(dict)
    plan: list[list[Active]] = [[] for _ in times]
    known: dict[tuple[bool, ...], int] = {}
    for name, pattern in choices(rule, *loras, steps=len(times)).items():
        number = known.setdefault(pattern, len(known))
        for who, (active, lora) in enumerate(zip(actives, loras, strict=True)):
            mine = [i for i, is_content in enumerate(pattern) if is_content == (who == 0)]
            if not mine or name not in lora:
                continue
            adapter = f"{active.adapter}_{number}"
            for i in mine if adapter not in parts else ():
                plan[i].append(replace(active, adapter=adapter))
            parts[adapter][name] = lora[name]
    return parts, scheduled(*formula, [tuple(step) for step in plan], times)


def scheduled(
    guidance: float, prompt: str, steps: Sequence[tuple[Active, ...]], times: Sequence[float]
) -> tuple[Term, ...]:
    """Classifier-free guidance with a choice of adapters per step. `times`: see `by_step`."""
    return by_step(steps, times, lambda now: classifier_free(guidance, prompt, now))


def by_step(
    steps: Sequence[tuple[Active, ...]],
    times: Sequence[float],
    terms: Callable[[tuple[Active, ...]], tuple[Term, ...]],
) -> tuple[Term, ...]:
    """The terms of each step's adapters, limited to that step.

    `times`: the time of each step, from 1 (pure noise) to 0. Neighbouring steps with the same adapters share terms."""
    middles = [inf, *((a + b) / 2 for a, b in pairwise(times)), -inf]
    found, first = [], 0
    for i, step in enumerate(steps):
        if i + 1 == len(steps) or steps[i + 1] != step:
            high, low = middles[first], middles[i + 1]
            some = [replace(one, t_max=min(one.t_max, high), t_min=max(one.t_min, low)) for one in terms(step)]
            found += [one for one in some if one.t_max >= one.t_min]
            first = i + 1
    return tuple(found)


def within(actives: Sequence[Active], windows: Sequence[tuple[float, float]], count: int) -> list[tuple[Active, ...]]:
    """The adapters of each of `count` steps. `windows`: the part of the steps in which each adapter acts; (0, 1) is all of
    them, and CRAFT's (arXiv 2602.18936) are (0, 0.7) for the content and (0.28, 1) for the style."""
    ranges = [range(round(begin * count), round(end * count)) for begin, end in windows]
    return [tuple(one for one, some in zip(actives, ranges, strict=True) if i in some) for i in range(count)]


def difference(weight: float, near: tuple[str, Active], far: tuple[str, Active]) -> tuple[Term, ...]:
    """ConsisLoRA's guidance (arXiv 2503.10614): λ (e_near − e_far), from one LoRA's prediction to another's.

    `near` and `far`: the role of the prompt that each LoRA was trained with, and the adapter. The terms are added to those
    of the guidance itself: e_u + w (e_c − e_u) + λ_c (e_nearᶜ − e_farᶜ) + λ_s (e_nearˢ − e_farˢ)."""
    return tuple(Term(sign * weight, prompt, (active,)) for sign, (prompt, active) in ((1.0, near), (-1.0, far)))


def sampling_times(network: Network, scheduler: Any, steps: int, size: tuple[int, int]) -> list[float]:
    """The times of a sampler's steps, from 1 (pure noise) to 0. `size`: height and width of the latents. Sets the
    scheduler to `steps` steps."""
    network.schedule(scheduler, steps, size)
    return torch.as_tensor(scheduler.timesteps).float().div(scheduler.config["num_train_timesteps"]).tolist()
