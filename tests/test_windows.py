"""Windows of timesteps: which adapter trains at which noise levels."""

from typing import Any

import pytest
import torch
from test_graphs import case
from test_many import start

from unbraid.bases.base import Base
from unbraid.bases.families import BLOCKS
from unbraid.common.errors import UsageError
from unbraid.core.lora import Active, Branch, Noise
from unbraid.core.train import train
from unbraid.methods import METHODS
from unbraid.methods.windows import divided
from unbraid.runs.settings import resolve

HAVING = ("unziplora", "pair")


def way(base: Base, t: torch.Tensor) -> float:
    """How far a timestep is on the way from noise (0) to picture (1)."""
    return 1 - float(t) / base.process.steps


def test_timesteps_come_from_the_part_alone_and_fill_it(v_model: Base) -> None:
    v_model.denoiser.double()
    model, _, state = start(v_model, case("dreambooth")[0], 0)()
    state.adapters.detach()
    rng = torch.Generator().manual_seed(0)
    found = [way(v_model, model.draw(["image"], frozenset(), rng, [Noise(part=(0.2, 0.5))])[0].t) for _ in range(400)]
    assert 0.2 <= min(found) < 0.22 and 0.48 < max(found) <= 0.5 and abs(sum(found) / 400 - 0.35) < 0.02
    with pytest.raises(UsageError, match="hardly trains"):
        model.draw(["image"], frozenset(), rng, [Noise(part=(0.50001, 0.50002))])


def test_a_pass_is_divided_by_windows() -> None:
    both = Branch("image", "both", (Active("content", prompt="content"), Active("style", prompt="style")))
    first, second = divided(both, (0.0, 0.7), (0.3, 1.0))
    assert [one.noise.part for one in (first, second)] == [(0.0, 0.7), (0.3, 1.0)]
    assert [[bool(a.trains) for a in one.active] for one in (first, second)] == [[True, False], [False, True]]
    assert first.active[1].prompt == "style" and first.active[1].scale == 1, "the other one still acts"
    (same,) = divided(both, (0.0, 0.7), (0.0, 0.7))
    assert same.active == both.active and same.noise.part == (0.0, 0.7)
    alone = Branch("after2", "style", (Active("content2", trains=frozenset()), Active("style")))
    assert [one.noise.part for one in divided(alone, (0.0, 0.7), (0.3, 1.0))] == [(0.3, 1.0)]


@pytest.mark.parametrize("method", HAVING)
def test_by_default_nothing_changes(method: str) -> None:
    settings = resolve(method, "icons", None, {})
    (recipe,) = METHODS[method].make(BLOCKS["sdxl"], **settings)
    assert {one.noise for step in range(recipe.steps) for one in recipe.branches(step)} == {Noise()}


@pytest.mark.parametrize("method", HAVING)
def test_each_adapter_learns_in_its_window(v_model: Base, method: str) -> None:
    """Where the other one's window is, an adapter has no gradient; both change in a training."""
    more: dict[str, Any] = {"style_from": 0} if method == "pair" else {"column_separation": False}
    recipe, _, _ = case(method, content_part="0-0.5", style_part="0.5-1", steps=3, **more)
    v_model.denoiser.double()
    model, recipe, state = start(v_model, recipe, 0)()
    for branch in recipe.branches(0):
        trained = [one.adapter for one in branch.active if one.trains]
        span = {"content": (0.0, 0.5), "style": (0.5, 1.0)}[trained[0]]
        assert len(trained) == 1 and branch.noise.part == span
    before = {
        name: [one.up.detach().clone() for one in state.adapters.pieces_of(name)] for name in ("content", "style")
    }
    for _ in train(model, recipe, state):
        pass
    for name, ups in before.items():
        assert any(not torch.equal(a, b.up) for a, b in zip(ups, state.adapters.pieces_of(name), strict=True)), name
    state.adapters.detach()


@pytest.mark.parametrize("wrong", ["", "0.5", "0.7-0.2", "0-1.5", "a-b", "-0.1-1", "nan-1"])
def test_no_part(wrong: str) -> None:
    with pytest.raises(UsageError, match="no part of 0 to 1"):
        METHODS["unziplora"].make(BLOCKS["sdxl"], content_part=wrong)


def test_it_is_explained() -> None:
    from unbraid.runs.explain import _branch

    text = _branch(Branch("image", "both", (), noise=Noise(0.03, (0.3, 1.0))))
    assert "noise offset 0.03" in text and "from 0.3 to 1 of the way" in text
