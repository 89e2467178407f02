"""Transparency as a mask: transparent parts do not count in the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from recorder import Recorder
from safetensors.torch import load_file
from test_many import start

from unbraid.bases.base import Base, RunData, load
from unbraid.bases.families import BLOCKS
from unbraid.common.errors import UsageError
from unbraid.core.graphs import Graphs
from unbraid.core.train import train
from unbraid.methods.dreambooth import dreambooth
from unbraid.runs.api import learn_job
from unbraid.runs.job import opened_images, prompts_of
from unbraid.runs.prepare import prepare
from unbraid.runs.run import run

QUICK: dict[str, Any] = {"rank": 2, "steps": 6, "lr": 1e-2, "previews": 0}


def cut_out(path: Path, left: str, right: str, opaque: str) -> Path:
    """A picture with one opaque and one transparent half."""
    image = Image.new("RGBA", (64, 64), left)
    ImageDraw.Draw(image).rectangle((32, 0, 63, 63), fill=right)
    alpha = Image.new("L", image.size, 255)
    side = (0, 0, 31, 63) if opaque == "right" else (32, 0, 63, 63)
    ImageDraw.Draw(alpha).rectangle(side, fill=0)
    image.putalpha(alpha)
    image.save(path)
    return path


def weight(base: Base, picture: Path, **settings: Any) -> torch.Tensor | None:
    job = learn_job(picture, prompt="a sks cat", base=base.name, out=picture.parent / "r", **QUICK, **settings)
    ready = prepare(job, prompts_of(job), opened_images(job), base)
    ready.adapters.detach()
    return ready.run_data.pictures["image"][0].weight


def test_a_mask_is_the_opacity_of_each_place(v_base: Path, tmp_path: Path) -> None:
    base = load(str(v_base), "cpu")
    found = weight(base, cut_out(tmp_path / "a.png", "red", "blue", "right"), mask="alpha")
    assert found is not None and found.shape == (1, 8, 8)
    assert bool((found[0, :, :4] < 0.05).all()) and bool((found[0, :, 4:] > 0.95).all()), "but for resampling"
    assert weight(base, tmp_path / "a.png") is None
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    whole = weight(base, tmp_path / "whole.png", mask="alpha")
    assert whole is not None and bool((whole == 1).all())


@pytest.mark.slow
def test_what_is_masked_teaches_nothing(v_model: Base) -> None:
    """Targets that differ only where the weight is 0 give the same gradients; other differences do not. Also in captured steps."""
    v_model.denoiser.double()
    begin, found = start(v_model, dreambooth(BLOCKS["sdxl"], rank=4, steps=8)[0], 0), {}
    mask = torch.zeros(1, 8, 8).double()
    mask[..., 4:] = 1
    for name, place, captured in (("plain", None, False), ("hidden", 0, False), ("seen", 7, False), ("graph", 0, True)):
        run_data, recipe, state = begin()
        run_data.graphs = Graphs(Recorder()) if captured else None
        drawn = run_data.draw

        def draw(*given: Any, drawn: Any = drawn, place: int | None = place) -> Any:
            samples = drawn(*given)
            for sample in samples:
                object.__setattr__(sample, "weight", mask[None])
                if place is not None:
                    sample.target[..., place] += 5
            return samples

        run_data.draw = draw  # type: ignore[method-assign]
        assert isinstance(run_data, RunData)
        figures = [step.figures for step in train(run_data, recipe, state)]
        state.adapters.detach()
        found[name] = torch.stack(figures)
    assert torch.equal(found["plain"], found["hidden"]) and torch.equal(found["hidden"], found["graph"])
    assert (found["plain"] - found["seen"]).abs().max() > 0.1


@pytest.mark.slow
def test_from_the_command_to_the_file(v_base: Path, tmp_path: Path) -> None:
    """A mask changes what is learnt. A completely transparent picture is refused before training."""
    file = cut_out(tmp_path / "a.png", "red", "blue", "right")
    for name in ("alpha", "none"):
        list(
            run(
                learn_job(file, prompt="a sks cat", base=str(v_base), out=tmp_path / name, mask=name, **QUICK),
                device="cpu",
            )
        )
    one, other = (load_file(tmp_path / name / "lora.safetensors") for name in ("alpha", "none"))
    assert any(not torch.equal(one[key], other[key]) for key in one)
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "nothing.png")
    with pytest.raises(UsageError, match=r"nothing\.png: is wholly transparent"):
        job = learn_job(
            tmp_path / "nothing.png", prompt="a cat", base=str(v_base), out=tmp_path / "n", mask="alpha", **QUICK
        )
        list(run(job, device="cpu"))
