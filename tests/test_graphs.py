"""Captured steps: which forms are captured, and that replayed steps equal normal ones, for every method."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recorder import Recorder
from test_many import ROLES, Start, start
from torch import nn

from unbraid.bases.base import Base, RunData, joined
from unbraid.bases.families import BLOCKS
from unbraid.bases.families.family import Prompt
from unbraid.core.adapters import Adapters
from unbraid.core.graphs import MOST, WARM, Graphs
from unbraid.core.lora import Active, Branch
from unbraid.core.many import train_many
from unbraid.core.optim import Rate
from unbraid.core.recipe import Recipe, Stop
from unbraid.core.train import precomputed_targets, train
from unbraid.methods import METHODS as ENTRIES
from unbraid.methods.blora import blora
from unbraid.methods.ziplora import ziplora
from unbraid.runs import shortest
from unbraid.runs.settings import open_settings
from unbraid.sampling.combine import switch
from unbraid.sampling.sample import Style, generate, style_guidance

SDXL, STEPS = BLOCKS["sdxl"], 9


def case(method: str, **settings: Any) -> tuple[Recipe, int, int]:
    """A method with few steps: its recipe, how many LoRAs it starts from, and how many different branches its steps have."""
    entry = ENTRIES[method]
    few = {name: value for name, value in {"rank": 4, "steps": STEPS}.items() if name in open_settings(entry)}
    (recipe,) = entry.make(SDXL, **{**shortest.settings(method), **few, **settings})
    forms = {branch for step in range(recipe.steps) for branch in recipe.branches(step)}
    return recipe, len(entry.inputs.of_kind("LoRA")), len(forms)


JOINING = {"steps": 2 * STEPS, "style_from": STEPS}
METHODS = {  # every method that trains; `make` needs modules that fit each other
    **{name: case(name) for name in ENTRIES if name != "make" and case(name)[0].steps},
    "unziplora alone": case("unziplora", content_alone=0.5),
    "unziplora, further": case("unziplora", steps=2 * STEPS, leak_weight=0.1, prior_weight=0.1, content_part="0-0.7"),
    "unziplora official": case("unziplora", compat="official"),
    "consislora": case("consislora", steps=2 * STEPS, x0_from=STEPS, style_steps=STEPS),
    "pair": case("pair", **JOINING),
    "pair official": case("pair", **JOINING, compat="official"),
    "dreambooth": case("dreambooth", prior_weight=0.5),
    "dreambooth, x0": case("dreambooth", loss="x0"),
}


def capturing(run_data: RunData, recorder: Recorder | None = None) -> Recorder:
    found = recorder or Recorder()
    run_data.graphs = Graphs(found)
    return found


@pytest.fixture
def unet_base(v_model: Base) -> Base:
    v_model.denoiser.double()
    return v_model


def trained(begin: Start, recorder: Recorder | None, at_once: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    run_data, recipe, state = begin()
    if recorder:
        capturing(run_data, recorder)
    figures = [value for step in train(run_data, recipe, state, at_once) for value in step.figures.tolist()]
    state.adapters.detach()
    return figures, state.tensors()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_replayed_steps_are_the_steps(unet_base: Base, name: str) -> None:
    """Losses, adapters, moments and masks are equal bit for bit, also with mergers, and when channels are granted or the style
    adapter begins to train."""
    recipe, loras, forms = METHODS[name]
    begin = start(unet_base, recipe, 0, loras=loras)
    figures, saved = trained(begin, None)
    recorder = Recorder()
    again, other = trained(begin, recorder)
    assert (recorder.captures, recorder.eager_calls) == (forms, WARM * forms) and recorder.replays > forms
    assert again == figures and same(saved, other)


def test_branches_in_one_pass_are_one_form(unet_base: Base) -> None:
    begin, recorder = start(unet_base, METHODS["dreambooth"][0], 0), Recorder()
    figures, _ = trained(begin, None, at_once=2)
    assert trained(begin, recorder, at_once=2)[0] == figures
    assert (recorder.captures, recorder.replays) == (1, STEPS - WARM)


def test_a_picture_of_another_shape_is_another_form(unet_base: Base) -> None:
    graphs, double = Graphs(Recorder()), lambda x: 2 * x
    for _ in range(WARM + 2):
        for shape in ((2,), (3,)):
            assert torch.equal(graphs("double", double, [torch.ones(shape)]), torch.full(shape, 2.0))
    assert graphs.executor.captures == 2 and graphs.executor.replays == 4  # type: ignore[attr-defined]


def test_forms_beyond_the_most_stay_as_they_are() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    for _ in range(WARM + 1):
        for i in range(MOST + 3):
            assert float(graphs(i, lambda x, i=i: x + i, [torch.zeros(())])) == i
    assert recorder.captures == recorder.replays == MOST and len(graphs.forms) == MOST


def test_gradients_add_up_over_the_calls_of_a_step() -> None:
    """Gradients of two captured calls and an uncaptured one add to existing gradients; other parameters get none."""
    weight, other = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(1.0))
    graphs = Graphs(Recorder())

    def call(x: torch.Tensor) -> torch.Tensor:
        (weight * x).backward()
        return x.clone()

    for _ in range(WARM + 2):
        weight.grad = None
        for key, x in (("a", 2.0), ("b", 5.0)):
            graphs(key, call, [torch.tensor(x)], [weight, other])
        call(torch.tensor(10.0))
        assert float(weight.grad) == 17 and other.grad is None  # type: ignore[arg-type]


def test_without_capture_it_goes_on_and_says_why(unet_base: Base) -> None:
    begin = start(unet_base, METHODS["unziplora"][0], 0)
    figures, saved = trained(begin, None)
    recorder = Recorder(fails="operation not permitted when stream is capturing\nmore of it")
    run_data, recipe, state = begin()
    capturing(run_data, recorder)
    again = [value for step in train(run_data, recipe, state) for value in step.figures.tolist()]
    state.adapters.detach()
    assert run_data.graphs and run_data.graphs.reason == "operation not permitted when stream is capturing"
    assert again == figures and same(saved, state.tensors())


def test_a_step_that_asks_for_a_value_is_found_out() -> None:
    """The tests above rely on this."""
    graphs = Graphs(Recorder())
    with pytest.raises(AssertionError, match="_local_scalar_dense in a captured call"):
        for _ in range(WARM + 1):
            graphs("x", lambda x: x * float(x), [torch.ones(())])
    with pytest.raises(AssertionError, match="lift_fresh in a captured call"):
        for _ in range(WARM + 1):
            graphs("y", lambda x: x * torch.tensor([2.0]), [torch.ones(1)])


def test_teachers_asked_ahead_are_captured(unet_base: Base) -> None:
    begin, answers = start(unet_base, ziplora(SDXL, steps=12)[0], 0, loras=2), []
    recorder = Recorder()
    for way in (None, recorder):
        run_data, recipe, state = begin()
        if way:
            capturing(run_data, way)
        drawn = precomputed_targets(run_data, recipe, state.adapters, state.rng, at_once=4)
        state.adapters.detach()
        answers.append([sample.target for samples in drawn for sample in samples])
    assert recorder.captures == 1 and recorder.replays == 3
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


def test_early_stopping_looks_through_graphs(unet_base: Base) -> None:
    """Validation trains nothing, with graphs either, and is captured as its own form."""

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        adapters.new("a", 4, rng, up_std=0.1)

    one = Branch("image", "both", (Active("a"),))
    stop = Stop((Branch("style", "both", (Active("a"),)),), every=1, patience=99, samples=1)
    recipe = Recipe(prepare, lambda step: (one,), {("a", "up"): Rate(1e-3), ("a", "down"): Rate(1e-3)}, 8, stop=stop)
    begin, recorder = start(unet_base, recipe, 0), Recorder()
    figures, saved = trained(begin, None)
    again, other = trained(begin, recorder)
    assert recorder.captures == 2 and again == figures and same(saved, other)


@pytest.mark.slow
def test_jobs_side_by_side_are_captured(unet_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared passes of several jobs are captured, and captured again when one job is done."""
    starts = [start(unet_base, blora(SDXL, rank=4, steps=8 + 8 * seed)[0], seed) for seed in (0, 1)]
    apart = [trained(begin, None)[1] for begin in starts]
    recorder, jobs = Recorder(), []
    monkeypatch.setattr(Base, "new_graphs", lambda self: Graphs(recorder))
    for begin in starts:
        jobs.append(begin())
        jobs[-1][2].adapters.detach()
    for _ in train_many(jobs, joined, 2):
        pass
    assert recorder.captures == 2 and recorder.replays > 4
    for found, (_, _, state) in zip(apart, jobs, strict=True):
        together = state.tensors()
        assert max((found[key].double() - together[key].double()).abs().max() for key in found) < 1e-12


def drawn(base: Base, adapters: Adapters, graphs: Callable[[], Graphs | None]) -> list[np.ndarray]:
    base.new_graphs = graphs  # type: ignore[method-assign]
    rng = torch.Generator().manual_seed(3)
    prompts = {role: Prompt(torch.randn(24, 64, generator=rng), torch.randn(64, generator=rng)) for role in ROLES}
    prompts["negative"] = Prompt(torch.zeros(24, 64), torch.zeros(64))
    styled = style_guidance(
        4.0, "image", [Style(Active("b"), "style", 2.0, start=0.6)], (Active("a", prompt="content"),)
    )
    in_turn = switch(4.0, "image", [Active("a"), Active("b")], [0.9, 0.6, 0.3])
    found = []
    for terms in (styled, in_turn):
        found += [np.asarray(one) for one in generate(base, terms, prompts, adapters, seeds=(0, 1), steps=12)]
    return found


@pytest.mark.slow
def test_drawings_are_the_same_through_graphs(v_model: Base) -> None:
    """With style guidance that begins late, and LoRAs that take turns: one graph for each set of terms."""
    adapters, rng, recorder = Adapters.attach(v_model.denoiser), torch.Generator().manual_seed(0), Recorder()
    for name in "ab":
        adapters.new(name, 4, rng, up_std=0.3)
    plain = drawn(v_model, adapters, lambda: None)
    graphs = drawn(v_model, adapters, lambda: Graphs(recorder))
    adapters.detach()
    assert recorder.captures >= 3 and recorder.replays > 6
    assert all(np.array_equal(one, other) for one, other in zip(plain, graphs, strict=True))
