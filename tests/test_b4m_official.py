"""Break-for-Make as its authors' code behaves: the order of updates, clipping, weight decay, and what is drawn again."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from full_size import UNET
from test_b4m import begun, parts, run_data
from torch import nn

from unbraid.bases.base import Base
from unbraid.core.adapters import ATTENTION, Adapters
from unbraid.core.lora import Factors, Lora
from unbraid.core.train import train
from unbraid.methods.b4m import Cut
from unbraid.methods.b4m_official import REDRAWN, is_redrawn, redraw

LR, SLOW, DECAY = 1e-2, 2e-3, 1e-2


def test_a_step_of_break(v_model: Base) -> None:
    """Compared with the published loop as it reads: two optimisers on gradients that only one of them clears."""
    settings = {"steps": 9, "compat": "official", "lr": LR, "partner_lr": SLOW}
    adapters, recipe, state = begun(v_model, **settings)
    model, count = run_data(v_model), 4
    for _, step in zip(range(count), train(model, recipe, state), strict=False):
        if step.index == 1:  # what is kept for the next step is in the state
            state.restore({key: value.clone() for key, value in state.tensors().items()})
    mine = [(*one.plain(), one.fixed) for one in parts(adapters)]
    adapters.detach()
    adapters, recipe, state = begun(v_model, **settings)
    pieces = adapters.pieces_of("module")
    fast, slow = [one.down for one in pieces], [one.up for one in pieces]
    for p in (*fast, *slow):
        p.requires_grad_()
    optimizers = [
        (fast, torch.optim.AdamW(fast, LR, weight_decay=DECAY)),
        (slow, torch.optim.AdamW(slow, SLOW, weight_decay=DECAY)),
    ]
    own, partner = recipe.branches(0)
    for _ in range(count):
        samples = model.draw(["own", "partner1"], recipe.passes.shared, state.rng)
        for branch, sample, (factor, optimizer) in zip((own, partner), samples, optimizers, strict=True):
            with adapters.activate([branch.active], model.prompts):
                (model.predict([sample], ["both"]) - sample.target).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(factor, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for one in pieces:
            assert one.fixed
            one.fixed.down *= 1 - LR * DECAY
            one.fixed.up *= 1 - SLOW * DECAY
    for (down, up, fixed), one in zip(mine, parts(adapters), strict=True):
        assert fixed and one.fixed and torch.allclose(fixed.up, one.fixed.up, rtol=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip((down, up), one.plain(), strict=True))
        assert down.any()
    adapters.detach()


def test_half_of_sdxls_layers_are_drawn_again() -> None:
    """280 of 560, of which 420 are square: to_out and the keys and values of text are kept."""
    with torch.device("meta"):
        layers = Adapters.attach(UNet2DConditionModel(**UNET), ATTENTION).layers
    shapes = {name: layer.base.weight.shape for name, layer in layers.items()}
    assert len(shapes) == 560 and sum(d == k for d, k in shapes.values()) == 420
    factors = {name: Factors(torch.empty(1, k), torch.empty(d, 1)) for name, (d, k) in shapes.items()}
    assert sum(is_redrawn(name, one) for name, one in factors.items()) == 280
    names = [f"a.attn{i}.{one}" for i in (1, 2) for one in ("to_q", "to_k", "to_v", "to_out.0")]
    assert [name for name in names if REDRAWN.search(name)] == [
        "a.attn1.to_q", "a.attn1.to_k", "a.attn1.to_v", "a.attn2.to_q",
    ]  # fmt: skip
    assert not is_redrawn("a.attn1.to_q", Factors(torch.zeros(2, 8), torch.zeros(4, 2))), "not square"


def test_what_is_drawn_again(v_model: Base) -> None:
    adapters, cut = Adapters.attach(v_model.denoiser, ATTENTION), Cut(8, 0.5, "first", False, True)
    fresh, seen = {name: cut.fresh(layer) for name, layer in adapters.layers.items()}, set()
    for name, layer in adapters.layers.items():
        folded = fresh[name].folded()
        style = Lora(folded.down, folded.up + (fresh[name].fixed.rows[:, None] * 0.5), 8.0)  # type: ignore[union-attr]
        made = cut.opened(layer, cut.joined(folded, style, name))
        if not is_redrawn(name, made):
            assert not made.down.any() or not (made.down * made.fixed.columns).any()  # type: ignore[union-attr]
            continue
        redraw(made, torch.Generator().manual_seed(0))
        assert made.fixed and not made.fixed.columns.all(), "the frozen half of down stays frozen"
        down, up = (one.detach() for one in made.plain())
        frozen, free = down[:, made.fixed.columns == 0], down[:, made.fixed.columns == 1]
        assert float(frozen.std()) == pytest.approx(1280**-0.5, rel=0.25)
        assert float(free.std()) == pytest.approx(1 / 8, rel=0.25)
        assert float(up[made.fixed.rows == 0].std()) == pytest.approx(1280**-0.5, rel=0.25)
        assert (up[made.fixed.rows == 1] == 0.5).all(), "the style's half is kept"
        seen.add(name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1])
    adapters.detach()
    assert seen == {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q"}


def test_halves_that_decayed_can_be_joined(v_model: Base) -> None:
    """Each module's frozen halves shrink at their own rate; halves of other bases are still refused."""
    cut = Cut(4, 0.5, "heads", False, True)
    layer = Adapters.attach_named(nn.Sequential(nn.Linear(8, 8)), ["0"]).layers["0"]
    plain = cut.fresh(layer).folded()
    shrunk = Lora(plain.down * 0.99, plain.up * 0.999, 4.0)
    joined = cut.joined(plain, shrunk, "0")
    assert torch.equal(joined.down[:, cut.frozen(8)], shrunk.down[:, cut.frozen(8)]), "the style file's, as published"
    with pytest.raises(Exception, match="do not share"):
        cut.joined(plain, Lora(plain.down.roll(1, 1), plain.up, 4.0), "0")
