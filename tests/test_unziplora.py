"""UnZipLoRA: the recipe as data, column separation, and the published behaviour."""

from typing import Any

import pytest
import torch

from unbraid.bases.base import Base, Picture, RunData
from unbraid.bases.families import BLOCKS
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import ALL
from unbraid.core.optim import Rate
from unbraid.core.recipe import Recipe
from unbraid.core.state import State
from unbraid.core.train import train
from unbraid.methods.columns import Columns, Ledger, ledger, pairs
from unbraid.methods.entry import ROLES
from unbraid.methods.unziplora import grant, unziplora
from unbraid.methods.unziplora_official import _above, _count, _gated

STEPS, TIMES, RATIO, WINDOW = 12, 3, 0.1, 2
SETTINGS = {
    "rank": 4,
    "steps": STEPS,
    "sample_times": TIMES,
    "column_ratio": RATIO,
    "window": WINDOW,
    "content_lr": 1e-3,
    "style_lr": 1e-3,
}


@pytest.fixture
def run_data(v_model: Base) -> RunData:
    rng = torch.Generator().manual_seed(1)
    prompts = {
        role: Prompt(torch.randn(24, 64, generator=rng), torch.randn(64, generator=rng)) for role in ("both", *ROLES)
    }
    picture = Picture(torch.randn(4, 8, 8, generator=rng), torch.full((4, 8, 8), 0.1), torch.full((6,), 32.0))
    return RunData(v_model, {"image": [picture]}, prompts)


def start(run_data: RunData, **changes: Any) -> tuple[State, Recipe]:
    (recipe,) = unziplora(BLOCKS["sdxl"], **{**SETTINGS, **changes})
    return State.fresh(Adapters.attach(run_data.base.denoiser), recipe, torch.Generator().manual_seed(0)), recipe


def test_golden_branches() -> None:
    (recipe,) = unziplora(BLOCKS["sdxl"])
    trains = f"trains={ALL!r}"
    assert (
        repr(recipe.branches(0))
        == repr(recipe.branches(599))
        == (
            "(Branch(image='image', prompt='both', active=("
            f"Active(adapter='content', scale=1.0, merger=True, {trains}, prompt='content', segment=None), "
            f"Active(adapter='style', scale=1.0, merger=True, {trains}, prompt='style', segment=None)), teacher=None, weight=1.0, loss='prediction', noise=Noise(offset=0.0, part=(0.0, 1.0))),)"
        )
    )
    (recipe,) = unziplora(BLOCKS["sdxl"], content_alone=0.5, style_alone=0.5)
    assert [(b.prompt, len(b.active), b.weight) for b in recipe.branches(0)] == [
        ("both", 2, 1),
        ("content", 1, 0.5),
        ("style", 1, 0.5),
    ]


def test_every_period_grants_exactly_the_ratio_and_content_chooses_first(run_data: RunData) -> None:
    state, recipe = start(run_data)
    columns = Columns(STEPS, TIMES, RATIO, WINDOW, BLOCKS["sdxl"])
    seen = set()
    for step in train(run_data, recipe, state):
        periods = sum(s % columns.period == WINDOW - 1 for s in range(step.index + 1))
        for name, both in pairs(state.adapters).items():
            d, exempt = len(ledger(both[0]).owned), columns.exempt(name)
            seen.add(exempt)
            for role, factors in zip(ROLES, both, strict=True):
                expected = d if exempt == role else periods * int(RATIO * d)
                assert int(ledger(factors).owned.sum()) == expected
                assert not factors.up.detach()[~ledger(factors).owned].any(), (
                    "a channel that is not owned must add nothing"
                )
            if exempt is None:
                assert not (ledger(both[0]).owned & ledger(both[1]).owned).any()
    assert seen == {None, "content", "style"}


def scored_ledger(scores: list[float], owned: bool = False) -> Ledger:
    made = Ledger(torch.zeros(len(scores)), owned)
    made.score += torch.tensor(scores)
    return made


def test_content_chooses_first_and_ties_go_to_the_lower_index() -> None:
    content, style = scored_ledger([1, 5, 5, 5, 2, 0, 0, 0, 0, 0]), scored_ledger([1, 9, 9, 1, 8, 8, 0, 0, 0, 0])
    grant(content, style, 0.2, None)
    assert content.owned.nonzero().flatten().tolist() == [1, 2] and style.owned.nonzero().flatten().tolist() == [4, 5]
    assert not content.score.any() and not style.score.any(), "a new period starts from zero"


def test_a_contested_channel_goes_to_the_one_it_matters_more_to() -> None:
    """Scores are relative to each adapter's own mean, so their scale does not matter."""
    sparse, full = scored_ledger([8, 6, 1, 1]), scored_ledger([100, 1000, 100, 100], owned=True)
    grant(sparse, full, 0.5, "style")
    assert sparse.owned.tolist() == [True, True, False, False] and full.owned.all()
    assert full.losing.tolist() == [True, False, False, False] and sparse.losing.tolist() == [False, True, False, False]


def test_gates_move_only_for_the_loser_of_a_contested_channel(run_data: RunData) -> None:
    state, recipe = start(run_data, steps=30, merger_lr=0.1)
    list(train(run_data, recipe, state))
    moved = 0
    for both in pairs(state.adapters).values():
        assert not (ledger(both[0]).losing & ledger(both[1]).losing).any()
        for factors in both:
            if factors.channels is None:  # its channels cannot be contested
                assert not ledger(factors).losing.any()
                continue
            assert (factors.channels[~ledger(factors).losing] == 1).all()
            assert (factors.channels >= 0).all() and (factors.channels <= 1).all()
            moved += int((factors.channels[ledger(factors).losing] < 0.5).sum())
    assert moved > 0


def test_separations_can_be_switched_off(run_data: RunData) -> None:
    state, recipe = start(run_data, column_separation=False)
    list(train(run_data, recipe, state))
    assert all(
        f.channels is None and f.up.detach().any(1).all() for both in pairs(state.adapters).values() for f in both
    )
    state.adapters.detach()
    state, recipe = start(run_data, block_separation=False)
    list(train(run_data, recipe, state))
    assert all(
        int(ledger(f).owned.sum()) == TIMES * int(RATIO * len(f.up))
        for both in pairs(state.adapters).values()
        for f in both
    )


def test_masks_and_scores_resume(run_data: RunData) -> None:
    state, recipe = start(run_data)
    steps = train(run_data, recipe, state)
    for _ in range(5):
        next(steps)
    saved = state.tensors()
    assert any(key.endswith("owned") for key in saved) and any(key.endswith("score") for key in saved)
    state.adapters.detach()
    other, _ = start(run_data)
    other.restore(saved)
    assert all(torch.equal(value, saved[key]) for key, value in other.tensors().items())


def test_sdxl_has_560_targets_in_three_groups() -> None:
    """By module name, on a UNet with SDXL's published configuration on the meta device."""
    from diffusers import UNet2DConditionModel

    sdxl: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl)
    adapters = Adapters.attach(unet)
    columns = Columns(600, 3, 0.1, 16, BLOCKS["sdxl"])
    groups = [columns.exempt(name) for name in adapters.layers]
    assert (len(groups), groups.count(None), groups.count("content"), groups.count("style")) == (560, 272, 160, 128)
    assert sum(layer.own_prompt for layer in adapters.layers.values()) == 140


def test_impossible_settings_are_told() -> None:
    with pytest.raises(UsageError, match=r"column_ratio 0\.5 does not fit 3 periods"):
        unziplora(BLOCKS["sdxl"], column_ratio=0.5)
    with pytest.raises(UsageError, match="window 500 does not fit"):
        unziplora(BLOCKS["sdxl"], window=500)


# The published behaviour, as compat="official"


def test_official_calendar() -> None:
    columns = Columns(600, 3, 0.1, 16, BLOCKS["sdxl"])
    assert [s for s in range(600) if not _gated(columns, s)] == [0, 1, 201, 401]


def test_official_start_disturbs_the_base(run_data: RunData) -> None:
    state, _ = start(run_data, compat="official", rank=16)
    factors = state.adapters.of("content")["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert factors.up.std().item() == pytest.approx(1 / 16, rel=0.2) and factors.down.std().item() == pytest.approx(
        1 / 16, rel=0.2
    )


def test_official_selection_is_strict_and_loses_ties() -> None:
    assert int(_above(torch.arange(10.0), 4).sum()) == 3
    assert int(_above(torch.ones(10), 4).sum()) == 0


@pytest.mark.parametrize("scale", [65536.0, 300.0])
def test_official_score_is_the_thresholded_count(scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(*shape, generator=rng)
        for name, shape in {"b": (7, 3), "a": (3, 5), "gb": (7, 3), "ga": (3, 5)}.items()
    }
    from unbraid.core.lora import Factors

    factors = Factors(state["a"], state["b"])
    factors.channels = torch.nn.Parameter(torch.rand(7, generator=rng))
    factors.down.grad, factors.up.grad = state["ga"] * 65536e-10 / scale, state["gb"] * 65536e-10 / scale
    change = (
        factors.channels[:, None] * (state["b"] @ state["ga"] + state["gb"] @ state["a"]) * 1e-10
    )  # a smaller scale counts larger gradients alike
    expected = ((state["b"] @ state["a"] * change * 65536).abs() > 1e-5).float().mean(1)
    assert torch.equal(_count(factors, scale), expected) and not torch.equal(_count(factors, 1e9), expected)
    assert 0 < expected.mean() < 1


def test_official_run_keeps_its_defects(run_data: RunData) -> None:
    """Masks are applied, gates of uncontested channels change at the start of a period, and weight decay applies to gates."""
    state, recipe = start(run_data, compat="official", steps=30, rank=8, merger_lr=0.05)
    assert recipe.rates["content", "merger"] == Rate(5e-3 * 10, 1e-4)
    for step in train(run_data, recipe, state):
        for both in pairs(state.adapters).values():
            for factors in both:
                gated = _gated(Columns(30, TIMES, RATIO, WINDOW, {}), step.index + 1) or step.index == 29
                owned = ledger(factors).owned
                assert factors.mask is not None
                assert torch.equal(factors.mask.bool(), owned if gated else torch.ones_like(owned))
    exclusive = [
        f.channels.detach()[ledger(f).owned & ~ledger(other).owned]
        for both in pairs(state.adapters).values()
        for f, other in (both, both[::-1])
        if f.channels is not None
    ]
    assert torch.cat(exclusive).numel() and (torch.cat(exclusive) < 1).any()


def test_explain_prints_the_method() -> None:
    from unbraid.runs.explain import explain

    text = explain("unziplora")
    assert "content (reads 'content') + style (reads 'style')" in text and "column_ratio = 0.3  (elsewhere 0.1)" in text


def test_blora_halves_touch_different_blocks(run_data: RunData) -> None:
    from unbraid.methods.blora import blora

    (recipe,) = blora(BLOCKS["sdxl"], rank=4, steps=3, lr=1e-2)
    state = State.fresh(Adapters.attach(run_data.base.denoiser), recipe, torch.Generator().manual_seed(0))
    for _ in train(run_data, recipe, state):
        pass
    content, style = (state.adapters.folded(role) for role in ("content", "style"))
    assert content.keys() and {name[:24] for name in content} == {"up_blocks.0.attentions.0"}
    assert style.keys() and {name[:24] for name in style} == {"up_blocks.0.attentions.1"}
    assert all(one.up.any() for half in (content, style) for one in half.values())
