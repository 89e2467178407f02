"""ConsisLoRA: what trains when, with which loss, rate and layers."""

from pathlib import Path

import pytest
import torch
from test_graphs import case
from test_many import start
from torch import Tensor

import unbraid
from unbraid.bases.base import Base
from unbraid.bases.families import BLOCKS
from unbraid.bench.rows.separate import reads_own_prompts
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.train import train
from unbraid.files.lora_file import read
from unbraid.methods.consislora import consislora

FEW = {"rank": 4, "steps": 4, "x0_from": 2, "style_steps": 3, "lr": 1e-2, "x0_lr": 5e-3, "weight_decay": 0.0}


def weights(adapters: Adapters, name: str) -> Tensor:
    return torch.cat([one.flatten() for lora in adapters.folded(name).values() for one in (lora.down, lora.up)])


def test_the_content_first_then_a_fresh_style_beside_it(v_model: Base) -> None:
    v_model.denoiser.double()
    run_data, recipe, state = start(v_model, case("consislora", **FEW)[0], 0)()
    names, seen = ("content", "draft", "style"), []
    before = {name: weights(state.adapters, name) for name in names}
    fresh = before["style"]
    for step in train(run_data, recipe, state):
        after = {name: weights(state.adapters, name) for name in names}
        moved = {name for name in names if not torch.equal(before[name], after[name])}
        largest = max(float((after[name] - before[name]).abs().max()) for name in names)
        (branch,) = recipe.branches(step.index)
        seen.append((moved, branch.loss, branch.prompt))
        assert step.index or largest == pytest.approx(1e-2, rel=1e-3), "Adam's first step is the rate"
        before = after
    state.adapters.detach()
    assert not torch.equal(before["style"], fresh) and not torch.equal(before["style"], before["draft"])
    first = {"content", "draft"}
    assert seen[:2] == [(first, "prediction", "both")] * 2 and seen[2:4] == [(first, "x0", "both")] * 2
    assert seen[4:] == [({"style"}, "x0", "style")] * 3 and len(seen) == 7


def test_the_rate_falls_with_the_loss(v_model: Base) -> None:
    """The style adapter's first step, at Adam's rate, is `x0_lr`; the content's was `lr`. A resumed run does the same."""
    v_model.denoiser.double()

    def found(resume_at: int) -> list[float]:
        run_data, recipe, state = start(v_model, case("consislora", **FEW)[0], 0)()
        before, moves = weights(state.adapters, "style"), []
        for step in train(run_data, recipe, state):
            after = weights(state.adapters, "style")
            moves.append(float((after - before).abs().max()))
            before = after
            if step.index == resume_at:
                saved = {key: value.clone() for key, value in state.tensors().items()}
                state.restore(saved)
        state.adapters.detach()
        return moves

    moves = found(-1)
    assert moves[:4] == [0.0] * 4 and moves[4] == pytest.approx(5e-3, rel=1e-3)
    assert found(3) == moves == found(5)


def test_its_layers_are_those_of_blora_and_the_files_are_ordinary(v_base: Path, picture: Path, tmp_path: Path) -> None:
    run = unbraid.split(
        picture, subject="cat", style="ink", method="consislora", base=str(v_base), out=tmp_path / "run",
        rank=2, steps=2, x0_from=1, style_steps=1, lr=1e-2, x0_lr=1e-2, previews=0,
    )  # fmt: skip
    assert {file.name for file in run.glob("*.safetensors")} == {"content.safetensors", "style.safetensors"}
    for role, prompt in (("content", "a sks"), ("style", "an image in ink style")):
        file = read(run / f"{role}.safetensors")
        assert file.metadata["unbraid.prompt"] == prompt and file.metadata["ss_steps"] == "3"
        assert all(name.startswith("unet." + BLOCKS["sdxl"][role][0]) for name in file.modules)
        assert any(one.up.any() for one in file.modules.values())


def test_both_read_one_prompt() -> None:
    """As in the paper; UnZipLoRA's LoRAs each read their own."""
    assert not reads_own_prompts("consislora", {}) and not reads_own_prompts("blora", {})
    assert reads_own_prompts("unziplora", {}) and reads_own_prompts("unziplora", {"compat": "official"})


def test_no_rate_at_all() -> None:
    with pytest.raises(UsageError, match="nothing is trained"):
        consislora(BLOCKS["sdxl"], lr=0.0)
