"""LoRAs that take turns: schedules, compared with their definitions, and pictures."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from unbraid.bases.base import load
from unbraid.common.errors import UsageError
from unbraid.core.lora import Active, Lora
from unbraid.core.lowrank import delta
from unbraid.files.lora_file import write
from unbraid.sampling.combine import (
    RULES,
    Combine,
    by_choice,
    choices,
    composite,
    sampling_times,
    scheduled,
    switch,
)
from unbraid.sampling.render import Sampling, Use, render
from unbraid.sampling.sample import Term

STEPS = 8
TIMES = [1 - i / STEPS for i in range(STEPS)]
BOTH = [Active("a", 0.8), Active("b")]


def lora(seed: int, size: float = 1.0, rank: int = 3, d: int = 12, k: int = 9) -> Lora:
    rng = torch.Generator().manual_seed(seed)
    return Lora(torch.randn(rank, k, generator=rng), size * torch.randn(d, rank, generator=rng), 2.0)


def at(terms: tuple[Term, ...], time: float) -> list[Term]:
    return [term for term in terms if term.t_min <= time <= term.t_max]


def test_every_step_has_its_own_adapters() -> None:
    steps = [(BOTH[0],), (BOTH[0],), (BOTH[1],), (), (BOTH[1],), (BOTH[0],), (BOTH[0],), (BOTH[0],)]
    terms = scheduled(4.0, "main", steps, TIMES)
    assert len(terms) == 2 * 5, "steps alike share their terms"
    for time, step in zip(TIMES, steps, strict=True):
        now = at(terms, time)
        assert [term.active for term in now] == [step, step] and sum(term.weight for term in now) == 1


def test_switch_and_composite() -> None:
    terms = switch(4.0, "main", BOTH, TIMES)
    assert [at(terms, time)[0].active[0].adapter for time in TIMES] == ["a", "b"] * (STEPS // 2)
    every = composite(4.0, "main", BOTH)
    assert [(term.weight, term.active) for term in every] == [
        (-1.5, (BOTH[0],)), (2.0, (BOTH[0],)), (-1.5, (BOTH[1],)), (2.0, (BOTH[1],)),
    ]  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules_are_their_formulas(name: str) -> None:
    """Compared with another implementation of arXiv 2502.18461 and 2508.02165: dense entries, step by step."""
    content = {"x": lora(0), "y": lora(1, 3.0), "mine": lora(2)}
    style = {"x": lora(3), "y": lora(4, rank=2), "yours": lora(5)}
    turns, common = choices(RULES[name], content, style, STEPS), ("x", "y")
    beta, wraps, power = {"k-lora": (0.5, False, 1), "k-lora-released": (1.275, True, 1), "est-lora": (0.5, True, 2)}[
        name
    ]
    gamma = sum(float((delta(content[n]).abs() ** power).sum()) for n in common) / sum(
        float((delta(style[n]).abs() ** power).sum()) for n in common
    )
    for module in common:
        count = len(content[module].down) * len(style[module].down) if power == 1 else 0
        s_c, s_s = (
            sum(sorted((delta(one[module]).abs() ** power).flatten().tolist())[-count:]) for one in (content, style)
        )
        bars = [1.5 * i / STEPS + beta for i in range(STEPS)]
        assert turns[module] == tuple(s_c / gamma > s_s * (bar % 1.5 if wraps else bar) for bar in bars)
    assert turns["mine"] == (True,) * STEPS and turns["yours"] == (False,) * STEPS
    rises = [all(a >= b for a, b in pairwise(turns[module])) for module in common]
    assert all(rises) if not wraps else not all(rises), "one change from content to style, unless the bar wraps"
    parts, terms = by_choice((4.0, "main"), RULES[name], BOTH, [content, style], TIMES)
    for i, time in enumerate(TIMES):
        working = {
            (module, active.adapter[0], active.scale)
            for active in at(terms, time)[0].active
            for module in parts[active.adapter]
        }
        wanted = {(m, "a", 0.8) if some[i] else (m, "b", 1.0) for m, some in turns.items()}
        assert working == wanted
    with pytest.raises(UsageError, match="no module in common"):
        choices(RULES[name], {"a": lora(0)}, {"b": lora(1)}, STEPS)
    with pytest.raises(UsageError, match="3 LoRAs"):
        by_choice((4.0, "main"), RULES[name], BOTH, [content] * 3, TIMES)


def test_pictures_of_every_kind(v_base: Path, tmp_path: Path) -> None:
    """With a second LoRA of strength 0, the sum draws what the first draws alone; taking turns draws another picture."""
    base = load(str(v_base), "cpu")
    files = []
    for i in range(2):
        rng = torch.Generator().manual_seed(i)
        modules = {}
        for name, layer in base.denoiser.named_modules():
            if type(layer).__name__ == "Linear" and ".attn" in name:
                d, k = layer.weight.shape
                modules[f"unet.{name}"] = Lora(torch.randn(4, k, generator=rng), torch.randn(d, 4, generator=rng), 4.0)
        files.append(tmp_path / f"{i}.safetensors")
        write(files[-1], modules, family="sdxl")
    times = sampling_times(base.family.network, base.pipe.scheduler, 4, (8, 8))
    assert len(times) == 4 and all(a > b for a, b in pairwise(times)) and max(times) <= 1

    def draw(combine: Combine, second: float) -> np.ndarray:
        uses = [Use(files[0]), Use(files[1], second)]
        (image,) = render(base, "a cat", uses, combine=combine, sampling=Sampling(steps=4))
        return np.asarray(image, np.int16)

    (alone,) = render(base, "a cat", [Use(files[0])], sampling=Sampling(steps=4))
    assert np.abs(draw("sum", 0.0) - np.asarray(alone, np.int16)).max() == 0
    pictures = [
        draw(combine, 1.0) for combine in ("sum", "switch", "composite", "k-lora", "k-lora-released", "est-lora")
    ]
    assert all(np.abs(a - b).mean() > 0.5 for i, a in enumerate(pictures) for b in pictures[:i])
