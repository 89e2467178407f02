"""Every method on every kind of base, end to end. The stock pipeline of the base loads the LoRAs and draws something else
with them."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image, ImageOps
from tiny_bases import SIDE, Tiny

from unbraid.bases.base import Base, load
from unbraid.bases.families import BLOCKS
from unbraid.bases.presets import Loading
from unbraid.files.lora_file import read
from unbraid.methods import METHODS
from unbraid.methods.entry import ROLES
from unbraid.runs import run as running
from unbraid.runs import shortest
from unbraid.runs.job import Job
from unbraid.runs.memory import estimate
from unbraid.sampling.render import Sampling, Use, render

pytestmark = pytest.mark.slow

# A file gives the weights of the folder that it was made from: tests/test_bases.py. An SDXL folder: tests/test_versions.py
BASES = (("tiny_sd15", "folder"), ("tiny_v", "file"))


def stock(tiny: Tiny, which: str, sdxl: bool) -> Any:
    """The base, opened by diffusers alone."""
    kind: Any = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if which == "folder":
            pipe = kind.from_pretrained(tiny.folder)
        else:
            pipe = kind.from_single_file(str(tiny.file), config=str(tiny.folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_picture(pipe: Any) -> np.ndarray:
    rng = torch.Generator().manual_seed(0)
    given = {"height": SIDE, "width": SIDE, "guidance_scale": 4.0, "num_inference_steps": 2, "generator": rng}
    return np.asarray(pipe("a sks cat in ink style", **given).images[0]).astype(int)


@contextmanager
def loaded(pipe: Any, file: Path) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    try:
        yield
    finally:
        pipe.unload_lora_weights()


def done(job: Job, device: str = "cpu") -> list[Path]:
    """Run a job and return its LoRA files. Checks that they are those that the method declares."""
    entry = METHODS[job.method]
    if job.base.endswith(".safetensors"):  # one base is enough
        found, (recipe,) = estimate(job, "cpu"), entry.make(BLOCKS["sdxl"], **job.settings)
        assert found.weights > 0 and found.adapters > 0 and (found.activations > 0) == (recipe.steps > 0)
    list(running.run(job, device=device))
    files = list(job.out.glob("*.safetensors"))
    assert {file.stem for file in files} == entry.outputs(job.settings).keys()
    return files


def material(picture: Path, out: Path) -> shortest.Material:
    """A picture, a second version of it, and partners for modules."""
    after, partners = out / "after.png", {}
    with Image.open(picture) as image:
        ImageOps.invert(image.convert("RGB")).save(after)
    for kind, text in (("content", "a teapot in red style"), ("style", "a teapot")):
        partners[kind] = out / "partners" / kind
        partners[kind].mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE), "red").save(partners[kind] / "a.png")
        (partners[kind] / "a.txt").write_text(text)
    return shortest.Material(picture, after, partners)


def everything(base: str, picture: Path, out: Path, device: str = "cpu") -> dict[str, list[Path]]:
    """Method → the files that its shortest run made."""
    given, made = material(picture, out), dict[str, list[Path]]()
    for method in shortest.in_order():
        if shortest.needs(method):
            loras = {file.stem: file for file in made[shortest.FIRST]}
            given = replace(given, loras=loras, modules=dict(zip(ROLES, made["break"], strict=True)))
        jobs = shortest.jobs(method, given, out, base=base, previews=0)
        made[method] = [file for job in jobs for file in done(job, device)]
    return made


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run gets its own base, but the files are read only once."""
    kept: dict[tuple[str, str], Base] = {}

    def copied(name: str, device: str, loading: Loading) -> Base:
        if (name, device) not in kept:
            kept[name, device] = load(name, device, loading)
        pipe = copy.copy(kept[name, device].pipe)
        pipe.unet = copy.deepcopy(pipe.unet)
        return Base(name, pipe, kept[name, device].device)

    monkeypatch.setattr(running, "load", copied)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(("kind", "which"), BASES)
def test_every_method_on_every_base(
    kind: str, which: str, request: pytest.FixtureRequest, picture: Path, tmp_path: Path
) -> None:
    tiny: Tiny = request.getfixturevalue(kind)
    works_elsewhere(everything(str(getattr(tiny, which)), picture, tmp_path), tiny, which, kind != "tiny_sd15")


def works_elsewhere(made: dict[str, list[Path]], tiny: Tiny, which: str, sdxl: bool) -> None:
    """Check that the stock pipeline draws something else with each LoRA, and the same as we do. `made`: see `everything`."""
    assert made.keys() == METHODS.keys() and all(made.values())
    pipe = stock(tiny, which, sdxl)
    plain = stock_picture(pipe)
    for method, files in made.items():
        for file in files:
            assert read(file).family == ("sdxl" if sdxl else "sd15")
            with loaded(pipe, file):
                change = np.abs(stock_picture(pipe) - plain).max()
                assert change > 2, f"{method}: {file.name} changes {change} of 255 levels"
    assert np.abs(stock_picture(pipe) - plain).max() <= 1, "and it is gone when it is unloaded"
    file = made["dreambooth"][0]
    with loaded(pipe, file):
        theirs = stock_picture(pipe)
    base = load(str(getattr(tiny, which)), "cpu")
    ours = render(base, "a sks cat in ink style", [Use(file)], sampling=Sampling(steps=2))[0]
    assert np.abs(np.asarray(ours).astype(int) - theirs).max() <= 2
