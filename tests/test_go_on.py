"""`learn --from FILE`: training starts from a LoRA, which may have been written by any tool."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import cli_in_process

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.files.lora_file import read
from unbraid.files.tools import convert
from unbraid.runs.api import learn_job
from unbraid.runs.batch import recorded
from unbraid.runs.run import run


def change(lora: Lora) -> torch.Tensor:
    return (lora.up.flatten(1).double() @ lora.down.flatten(1).double()) * lora.alpha / len(lora.down)


@pytest.mark.slow
def test_it_begins_with_the_file_and_goes_on(v_base: Path, picture: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": str(v_base), "previews": 0, "steps": 5}
    list(run(learn_job(picture, prompt="a sks cat", out=tmp_path / "a", rank=3, lr=1e-3, **options), device="cpu"))
    first = tmp_path / "a" / "lora.safetensors"
    convert(first, tmp_path / "d.safetensors", "diffusers")
    begun = read(first).modules
    for name, file in (("own", first), ("converted", tmp_path / "d.safetensors")):
        still = learn_job(
            picture, prompt="a sks cat", out=tmp_path / name, from_=file, lr=0.0, weight_decay=0.0, **options
        )
        assert still.settings["rank"] == 3
        list(run(still, device="cpu"))
        assert recorded(tmp_path / name / "run.toml") == still
        same = read(tmp_path / name / "lora.safetensors").modules
        assert same.keys() == begun.keys()
        for key, lora in begun.items():
            assert (change(same[key]) - change(lora)).norm() <= 2e-3 * change(lora).norm(), key
    on = learn_job(picture, prompt="a sks cat", out=tmp_path / "on", from_=first, lr=1e-3, **options)
    list(run(on, device="cpu"))
    moved = read(tmp_path / "on" / "lora.safetensors").modules
    far = torch.cat([(change(moved[key]) - change(lora)).flatten() for key, lora in begun.items()]).norm()
    whole = torch.cat([change(lora).flatten() for lora in begun.values()]).norm()
    assert 0.05 * whole < far < 5 * whole, "it goes on from there, not anew"


def test_what_does_not_fit_is_one_line(v_base: Path, sd15_base: Path, picture: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": str(v_base), "previews": 0, "steps": 1}
    list(run(learn_job(picture, prompt="a cat", out=tmp_path / "a", rank=2, **options), device="cpu"))
    file = tmp_path / "a" / "lora.safetensors"
    with pytest.raises(UsageError, match="'rank' is the LoRA's own"):
        learn_job(picture, prompt="a cat", from_=file, rank=4, **options)
    for base, lora in ((sd15_base, file), (v_base, picture), (v_base, tmp_path / "none.safetensors")):
        arguments = [
            "learn",
            str(picture),
            "--prompt",
            "a cat",
            "--from",
            str(lora),
            "--base",
            str(base),
            "--out",
            str(tmp_path / "x"),
        ]
        code, text = cli_in_process([*arguments, "--quiet", "--set", "steps=1"])
        assert code == 1 and len(text.splitlines()) == 1 and not (tmp_path / "x").exists(), text
