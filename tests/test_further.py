"""Further losses and steps of `split` and `pair`: each compared with its definition, and off by default."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graphs import case
from test_many import start
from torch import Tensor

import unbraid
from unbraid.bases.base import Base, RunData, load
from unbraid.bases.families import BLOCKS
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch
from unbraid.core.recipe import Recipe
from unbraid.core.state import State
from unbraid.core.train import draw, train
from unbraid.methods import METHODS
from unbraid.methods.columns import ledger
from unbraid.methods.pair import pair
from unbraid.methods.unziplora import unziplora
from unbraid.runs.settings import resolve

Ready = tuple[RunData, Recipe, State]
FEW = {"rank": 4, "window": 1, "sample_times": 2, "column_ratio": 0.25, "content_lr": 1e-2, "style_lr": 1e-2}


def ready(base: Base, method: str, **settings: Any) -> Ready:
    base.denoiser.double()
    return start(base, case(method, **settings)[0], 0)()


def weights(adapters: Adapters, name: str) -> Tensor:
    return torch.cat([p.detach().flatten() for one in adapters.pieces_of(name) for _, p in one.parts()])


def ups(adapters: Adapters, name: str) -> list[Tensor]:
    return [one.up for one in adapters.pieces_of(name)]


@pytest.mark.parametrize(("name", "method"), [("unziplora", unziplora), ("pair", pair)])
def test_by_default_steps_are_what_they_were(name: str, method: Callable[..., tuple[Recipe, ...]]) -> None:
    settings = resolve(name, "icons", None, {})
    (recipe,) = METHODS[name].make(BLOCKS["sdxl"], **settings)
    bare = ("content_part", "style_part", "leak_weight", "prior_weight", "style_steps", "loss", "x0_from")
    (plain,) = method(BLOCKS["sdxl"], **{key: value for key, value in settings.items() if key not in bare})
    assert recipe.steps == plain.steps
    assert all(recipe.branches(step) == plain.branches(step) for step in range(recipe.steps))


def test_the_adapters_that_train_take_turns_on_what_the_base_draws() -> None:
    def seen(name: str, **settings: Any) -> list[Branch]:
        (recipe,) = METHODS[name].make(BLOCKS["sdxl"], prior_weight=0.5, steps=6, **settings)
        return [one for step in range(recipe.steps) for one in recipe.branches(step) if one.image == "prior"]

    split = seen("unziplora", sample_times=1, window=1)
    assert [[a.adapter for a in one.active] for one in split] == [["content"], ["style"]] * 3
    assert {(one.prompt, one.weight, one.active[0].prompt, one.teacher) for one in split} == {
        ("prior", 0.5, None, None)
    }
    assert [one.active[0].adapter for one in seen("pair", style_from=2)] == ["style"] * 4
    assert METHODS["unziplora"].prompts["prior"] == METHODS["pair"].prompts["prior"] == "a {subject}"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unziplora", "pair"])
def test_the_base_draws_the_pictures_of_the_prior(v_base: Path, picture: Path, tmp_path: Path, method: str) -> None:
    """From the command to the file: pictures of another shape than the drawings, and a style that trains from step 1 on."""
    given: dict[str, Any] = {
        "subject": "cat",
        "style": "ink",
        "base": str(v_base),
        "previews": 0,
        "steps": 2,
        "rank": 2,
    }
    given |= {"prior_weight": 0.5, "out": tmp_path / "run", "resolution": 24}
    if method == "unziplora":
        run = unbraid.split(picture, **given, window=1, sample_times=1)
    else:
        run = unbraid.pair(picture, picture.with_name("other.png"), **given, style_from=1)
    lines = (run / "events.jsonl").read_text().splitlines()
    assert "prior" in lines[-1] and ("prior" in lines[0]) == (method == "unziplora")


@pytest.fixture(autouse=True)
def other(picture: Path) -> Path:
    """A picture after, for `pair`."""
    from PIL import Image, ImageOps

    path = picture.with_name("other.png")
    ImageOps.invert(Image.open(picture)).save(path)
    return path


def test_the_leak_loss_is_its_formula(v_model: Base) -> None:
    """E ‖ε_style(x_t, content prompt) − ε(x_t, content prompt)‖²; it reaches the style adapter alone."""
    model, recipe, state = ready(v_model, "unziplora", leak_weight=0.5, column_separation=False)
    (leak,) = (one for one in recipe.branches(0) if one.teacher)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for up in ups(state.adapters, "content") + ups(state.adapters, "style"):
            up.copy_(torch.randn(up.shape, generator=rng) / 4)
    (sample,) = draw(model, recipe, [leak], state.rng.clone_state())

    def predicted(*active: Active) -> Tensor:
        with state.adapters.activate([active], model.prompts):
            return model.predict([sample], ["content"])

    wanted = (predicted(Active("style")) - predicted().detach()).square().mean()
    gradients = torch.autograd.grad(wanted, ups(state.adapters, "style"))
    assert leak.weight == 0.5 and wanted > 1e-4
    before = weights(state.adapters, "content")
    step = next(train(model, Recipe(recipe.prepare, lambda _: (leak,), recipe.rates, 1), state))
    assert torch.equal(weights(state.adapters, "content"), before)
    state.adapters.detach()
    assert step.losses[0] == pytest.approx(wanted.item(), rel=1e-9)
    assert all(bool(one.any()) for one in gradients)


def test_the_leak_loss_lowers_the_leak(v_model: Base) -> None:
    found = {}
    for weight in (0.0, 20.0):
        model, recipe, state = ready(v_model, "unziplora", leak_weight=weight, steps=8, **FEW)
        for _ in train(model, recipe, state):
            pass
        branch = Branch("image", "content", (Active("style", trains=frozenset()),), Branch("image", "content"))
        probe = Recipe(recipe.prepare, lambda _, one=branch: (one,) * 4, recipe.rates, 9)
        found[weight] = sum(next(train(model, probe, state)).losses)
        state.adapters.detach()
    assert found[20.0] < found[0.0] / 2


@pytest.mark.parametrize("separation", [True, False])
def test_the_style_is_learnt_again_beside_the_finished_content(v_model: Base, separation: bool) -> None:
    """The content does not move any more, gates included. The style starts at ΔW = 0, and stays within its channels."""
    settings = {**FEW, "steps": 4, "style_steps": 3, "content_alone": 0.5, "column_separation": separation}
    model, recipe, state = ready(v_model, "unziplora", **settings)
    assert recipe.steps == 7 and len(recipe.branches(3)) == 2 and len(recipe.branches(4)) == 1
    contents, styles, owned = [], [], []
    for _ in train(model, recipe, state):
        contents.append(weights(state.adapters, "content"))
        styles.append(torch.cat([up.detach().flatten() for up in ups(state.adapters, "style")]))
        if separation:
            owned.append([ledger(one).owned.clone() for one in state.adapters.pieces_of("style")])
    assert not torch.equal(contents[2], contents[3]) and all(torch.equal(one, contents[3]) for one in contents[4:])
    assert styles[2].any() and not styles[3].any() and styles[4].any() and not torch.equal(styles[4], styles[6])
    for last, up in zip(owned[3] if separation else (), ups(state.adapters, "style"), strict=False):
        assert not up[~last].any()
    assert all(
        torch.equal(a, b) for a, b in zip(owned[3] if separation else (), owned[-1] if separation else (), strict=True)
    )
    state.adapters.detach()


def test_a_resumed_run_learns_the_style_again_too(v_model: Base) -> None:
    found = []
    for resume_at in (-1, 3, 5):
        model, recipe, state = ready(v_model, "unziplora", **FEW, steps=4, style_steps=3)
        for step in train(model, recipe, state):
            if step.index == resume_at:
                state.restore({key: value.clone() for key, value in state.tensors().items()})
        found.append(weights(state.adapters, "style"))
        state.adapters.detach()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_published_code_has_no_second_style() -> None:
    with pytest.raises(UsageError, match="style_steps"):
        METHODS["unziplora"].make(BLOCKS["sdxl"], style_steps=5, compat="official")


def test_all_at_once(v_model: Base) -> None:
    """Every further setting together, with column separation: the steps run, and both adapters learn."""
    parts = {"content_part": "0-0.7", "style_part": "0.3-1", "loss": "x0"}
    model, recipe, state = ready(
        v_model, "unziplora", **FEW, **parts, steps=4, style_steps=2, leak_weight=0.1, prior_weight=0.1
    )
    assert all(torch.isfinite(step.figures).all() for step in train(model, recipe, state))
    assert all(
        bool(torch.cat([up.flatten() for up in ups(state.adapters, name)]).any()) for name in ("content", "style")
    )
    state.adapters.detach()


@pytest.mark.parametrize("base", ["v_base", "eps_base"])
@pytest.mark.parametrize("method", ["unziplora", "pair"])
def test_the_x0_loss_trains_both(base: str, method: str, request: pytest.FixtureRequest) -> None:
    """Losses of the first step are those of the prediction times the factor of their timesteps; training goes on from there."""
    loaded, found = load(str(request.getfixturevalue(base)), "cpu"), {}
    for loss in ("prediction", "x0"):
        model, recipe, state = ready(loaded, method, loss=loss, steps=3)
        samples = draw(model, recipe, recipe.branches(0), state.rng.clone_state())
        factors = [float(model.x0_factor(one.t)) for one in samples]
        steps = list(train(model, recipe, state))
        found[loss] = (steps[0].losses, factors, weights(state.adapters, "style"))
        state.adapters.detach()
    plain, factors, before = found["prediction"]
    assert found["x0"][0] == pytest.approx([a * b for a, b in zip(plain, factors, strict=True)], rel=1e-5)
    assert not torch.equal(before, found["x0"][2])
