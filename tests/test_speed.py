"""In double precision, the published forms in `tools.speed` compute the same as ours."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from double import double, in_double

from tools.speed.__main__ import gpu
from tools.speed.cases import CASES, SDXL
from tools.speed.count import _kinds
from tools.speed.gpu import whole_run
from tools.speed.published import Form, dense_product, factorised, published
from tools.speed.time import timed
from tools.speed.workload import WORDS, Workload, icons
from unbraid.bases.base import Base, Picture, RunData
from unbraid.bases.families.family import Prompt
from unbraid.core.adapters import Adapters
from unbraid.core.recipe import Recipe
from unbraid.core.state import State
from unbraid.core.train import train
from unbraid.methods.dreambooth import dreambooth
from unbraid.methods.pair import pair
from unbraid.methods.unziplora import unziplora

STEPS = 6
METHODS: dict[str, tuple[Recipe, Form]] = {
    "split": (unziplora(SDXL, rank=4, steps=STEPS, sample_times=2, window=1, compat="official")[0], dense_product),
    "pair": (pair(SDXL, rank=4, steps=STEPS, style_from=2, lr=1e-3, compat="official")[0], factorised),
    "learn": (dreambooth(SDXL, rank=4, steps=STEPS, lr=1e-3)[0], factorised),
}


@pytest.fixture
def run_data(v_model: Base) -> Iterator[RunData]:
    rng = torch.Generator().manual_seed(1)
    v_model.denoiser.double()

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).double()

    pictures = {
        role: [Picture(noise(4, 8, 8), torch.full((4, 8, 8), 0.1).double(), torch.full((6,), 32.0))]
        for role in ("image", "before", "after")
    }
    prompts = {role: Prompt(noise(24, 64), noise(64)) for role in ("both", "content", "style")}
    yield RunData(v_model, pictures, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_published_loop_equals_ours(run_data: RunData, name: str, checkpointing: bool) -> None:
    recipe, form = METHODS[name]
    found = []
    for ours in (False, True):
        adapters, unet = Adapters.attach(run_data.base.denoiser), run_data.base.denoiser
        if checkpointing and not ours:
            unet.enable_gradient_checkpointing()
            unet.train()
        if ours:
            state = State.fresh(adapters, in_double(recipe), torch.Generator().manual_seed(0))
            state.rng = torch.Generator().manual_seed(0)
            list(train(run_data, recipe, state, 2))
        else:
            recipe.prepare(adapters, torch.Generator().manual_seed(0))
            double(adapters)
            loop = published(run_data.base, lambda: run_data.pictures, run_data.encoded, recipe, adapters, form)
            list(islice(loop, STEPS))
            loop.close()
            unet.disable_gradient_checkpointing()
            unet.eval()
        parts = [
            (f"{one} {part}", p.detach())
            for one in adapters.names
            for f in adapters.of(one).values()
            for part, p in f.parts()
        ]
        found.append(parts)
        adapters.detach()
    moved = 0.0
    for (what, one), (_, other) in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-9), what
        moved = max(moved, float(one.abs().max()))
    assert moved > 0


@pytest.mark.slow
def test_every_case_says_what_a_run_is_made_of() -> None:
    """`pair` has two kinds of steps, a third of them without the style adapter; the others have one kind."""
    for name, case in CASES.items():
        kinds = _kinds(case.ours(4, case.steps).branches(i) for i in range(case.steps))
        assert [round(share, 3) for _, share in kinds] == ([0.333, 0.667] if name == "pair" else [1.0])


@pytest.mark.slow
def test_the_bench_runs_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    """On the embedded base, with a few steps each. The measurements do not change the base."""
    workload = icons("cpu")
    before = {key: value.clone() for key, value in workload.base.denoiser.state_dict().items()}
    ways = [way for way, _ in timed("zip", workload, 1, 1)]
    assert ways == ["published", "published, no gradient checkpointing", "ours", "ours, teachers precomputed"]
    after = workload.base.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    gpu(["split"])
    assert torch.cuda.is_available() or "No GPU here" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split", "zip", "learn"])
def test_losses_of_half_precision_are_full_precision(v_model: Base, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: weights and activations in bf16, targets in fp32. On CUDA a loss of two dtypes fails; on a CPU it does not."""
    unet: Any = v_model.denoiser
    unet.to(torch.bfloat16)
    prompts = {role: Prompt(torch.randn(24, 64).bfloat16(), torch.randn(64).bfloat16()) for role in WORDS}
    picture = Picture(torch.randn(4, 8, 8), torch.full((4, 8, 8), 0.1), torch.full((6,), 32.0))
    workload, losses, mse = (
        Workload(v_model, prompts, lambda roles: {role: [picture] for role in roles}, 4, "tiny"),
        [],
        F.mse_loss,
    )

    def loss(out: torch.Tensor, target: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        assert out.dtype == target.dtype == torch.float32
        losses.append(mse(out, target, reduction=reduction))
        return losses[-1]

    monkeypatch.setattr(F, "mse_loss", loss)
    assert all(seconds > 0 for _, seconds in timed(name, workload, 1, 1, warm=0)) and losses


def test_a_whole_run_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = icons("cpu")
    monkeypatch.setattr("tools.speed.gpu.CASES", {"pair": replace(CASES["pair"], steps=3)})
    seconds, _ = whole_run("pair", workload)
    assert seconds > 0 and not any("adapters" in name for name, _ in workload.base.denoiser.named_modules())
