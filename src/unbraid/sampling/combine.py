"""Ways to combine LoRAs in a picture that no weighted sum of files can express: by turns over steps or layers, in parts of
the steps, or against other LoRAs.

All of them are guidance terms that count in a range of times (`unbraid.sampling.sample.Term`). The model needs no
hooks, and every scheduler works.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import Literal

import torch

from unbraid.common.errors import UsageError
from unbraid.core.lora import Active, Lora
from unbraid.core.lowrank import delta
from unbraid.sampling.sample import Term, classifier_free

Combine = Literal["sum", "switch", "composite", "k-lora"]
ALPHA, BETA = 1.5, 0.5  # α and β of K-LoRA, arXiv 2502.18461


def composite(guidance: float, prompt: str, actives: Sequence[Active]) -> tuple[Term, ...]:
    """LoRA Composite (arXiv 2402.16843): each LoRA makes a guided prediction of its own, and their mean is used."""
    terms = [term for one in actives for term in classifier_free(guidance, prompt, (one,))]
    return tuple(replace(term, weight=term.weight / len(actives)) for term in terms)


def switch(guidance: float, prompt: str, actives: Sequence[Active], times: Sequence[float]) -> tuple[Term, ...]:
    """LoRA Switch (arXiv 2402.16843): one LoRA per step, in turn. `times`: see `scheduled`."""
    return scheduled(guidance, prompt, [(actives[i % len(actives)],) for i in range(len(times))], times)


def k_lora(content: Mapping[str, Lora], style: Mapping[str, Lora], steps: int) -> dict[str, int]:
    """K-LoRA's choice per module (arXiv 2502.18461): module → the number of first steps that use the content LoRA.

    The remaining steps use the style LoRA. S is the sum of the r_c·r_s largest |entries| of a LoRA's ΔW in the module
    (r_c, r_s: the two ranks). γ is the ratio of the sums of all |entries| in all common modules, content to style.
    Step i of n uses the content LoRA while S_c / γ > S_s (α i/n + β). A module that only one LoRA has always uses it.
    Raises UsageError if the LoRAs have no module in common."""
    sums: dict[str, tuple[float, float]] = {}
    totals = [0.0, 0.0]
    for name in content.keys() & style.keys():
        count = len(content[name].down) * len(style[name].down)
        sizes = [delta(lora[name]).abs().flatten() for lora in (content, style)]
        top = [float(one.topk(min(count, len(one))).values.sum()) for one in sizes]
        sums[name] = (top[0], top[1])
        totals = [total + float(one.sum()) for total, one in zip(totals, sizes, strict=True)]
    if not sums or not all(totals):
        raise UsageError("the LoRAs have no module in common", "k-lora", "Use them together as they are.")
    gamma = totals[0] / totals[1]
    turns = {
        name: sum(c / gamma > s * (ALPHA * i / steps + BETA) for i in range(steps)) for name, (c, s) in sums.items()
    }
    only = dict.fromkeys(content.keys() - style.keys(), steps) | dict.fromkeys(style.keys() - content.keys(), 0)
    return turns | only


def k_lora_terms(
    guidance: float,
    prompt: str,
    actives: Sequence[Active],
    loras: Sequence[Mapping[str, Lora]],
    times: Sequence[float],
) -> tuple[dict[str, dict[str, Lora]], tuple[Term, ...]]:
    """Split two LoRAs into adapters by the step at which a module changes from content to style (`k_lora`).

    Returns the adapters, name → module → factors, and the guidance terms that use them."""
    if len(loras) != 2:
        raise UsageError(f"{len(loras)} LoRAs", "k-lora", "Give two: a content LoRA, then a style LoRA.")
    parts: dict[str, dict[str, Lora]] = defaultdict(dict)
    plan: list[list[Active]] = [[] for _ in times]
    for name, turn in k_lora(*loras, steps=len(times)).items():
        for who, first, last in ((0, 0, turn), (1, turn, len(times))):
            if first == last or name not in loras[who]:
                continue
            adapter = f"{actives[who].adapter}_{turn}"
            if adapter not in parts:
                for i in range(first, last):
                    plan[i].append(replace(actives[who], adapter=adapter))
            parts[adapter][name] = loras[who][name]
    return parts, scheduled(guidance, prompt, [tuple(step) for step in plan], times)


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


def sampling_times(scheduler: object, steps: int) -> list[float]:
    """The times of a sampler's steps, from 1 (pure noise) to 0. Sets the scheduler to `steps` steps."""
    scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    total = scheduler.config["num_train_timesteps"]  # type: ignore[attr-defined]
    return torch.as_tensor(scheduler.timesteps).float().div(total).tolist()  # type: ignore[attr-defined]
