"""Counts FLOPs of a training step and bytes kept for gradients, at SDXL's shapes on fake tensors, for our form and the
published form."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.speed.cases import BOTH, CASES, Case, random_adapters, train_only
from tools.speed.published import factorised, formulas
from unbraid.bench.measure import Meter, encoder_flops, sdxl
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Branch

RANK = 64


@dataclass(frozen=True)
class Count:
    """The mean over the steps of a run: TFLOP in total, TFLOP of encoding pictures; and the most GB kept for gradients."""

    tflop: float
    encoding: float
    kept: float


def counted(name: str) -> Iterator[tuple[str, Count]]:
    """Yield (name, count) of the published step with and without gradient checkpointing, and of our step."""
    case = CASES[name]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            if case.checkpointing:
                yield "published", _published(case, True)
            yield (
                "published, without gradient checkpointing" if case.checkpointing else "published",
                _published(case, False),
            )
            if not case.checkpointing:
                yield "published, with gradient checkpointing", _published(case, True)
            if case.form is not factorised and name == "zip":
                yield "ours, teachers precomputed", _ours(case, live=False)
            yield "ours", _ours(case, live=True)
    finally:
        torch.set_default_dtype(default)


def _kinds(branches: Iterator[tuple[Branch, ...]]) -> list[tuple[tuple[Branch, ...], float]]:
    """The different kinds of steps of a run, and their shares."""
    found = Counter(branches)
    return [(one, n / found.total()) for one, n in found.items()]


def _published(case: Case, checkpointing: bool) -> Count:
    recipe, vae = case.published(RANK, case.steps), encoder_flops(case.side)
    unet, call = sdxl(case.side)
    adapters = Adapters.attach(unet)
    random_adapters(case, adapters, RANK, mergers=True)
    train_only(case, adapters, case.parts if case.form is not factorised else BOTH)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    flops, kept, pictures = 0.0, 0, 0.0
    with formulas(unet, adapters, case.form, _prompts(case)) as activate:
        for branches, share in _kinds(recipe.branches(i) for i in range(case.steps)):
            meters = []
            for branch in branches:
                meters.append(Meter(unet))
                if branch.teacher:
                    activate(branch.teacher.active)
                    meters[-1](lambda: call(1), grad=False)
                activate(branch.active)
                meters[-1](lambda: call(1), grad=True)
            joint = any(branch.teacher for branch in branches)  # all graphs live until the loss
            kept = max(kept, (sum if joint else max)(meter.kept for meter in meters))
            flops += share * sum(meter.flops for meter in meters)
            pictures += share * (2 if case.form is factorised and len(case.adapters) == 2 else len(branches))
    encoding = pictures * vae / 1e12
    return Count(flops / 1e12 + encoding, encoding, kept / 1e9)


def _ours(case: Case, live: bool) -> Count:
    recipe = case.ours(RANK, case.steps)
    unet, call = sdxl(case.side)
    adapters = Adapters.attach(unet)
    random_adapters(case, adapters, RANK, mergers=True)
    train_only(case, adapters, case.parts)
    adapters.pack()
    prompts, flops, kept = _prompts(case), 0.0, 0
    for branches, share in _kinds(recipe.branches(i) for i in range(case.steps)):
        meter = Meter(unet)
        with torch.no_grad():
            call(len(branches))  # fills the cache of the prompts' keys and values, as in every step but the first
        teachers = [branch.teacher for branch in branches if branch.teacher]
        if teachers and live:
            _pass(meter, adapters, call, teachers, prompts, grad=False)
        _pass(meter, adapters, call, list(branches), prompts, grad=True)
        flops, kept = flops + share * meter.flops, max(kept, meter.kept)
    return Count(flops / 1e12, 0.0, kept / 1e9)


def _pass(
    meter: Meter, adapters: Adapters, call, branches: list[Branch], prompts: dict[str, Tensor], grad: bool
) -> None:
    def run() -> Tensor:
        with adapters.activate([branch.active for branch in branches], prompts):
            return call(len(branches))

    meter(run, grad=grad)


def _prompts(case: Case) -> dict[str, Tensor]:
    return {name: torch.randn(77, 2048) for name in (*case.adapters, "both")}
