"""Every method on every kind of base, end to end; the stock pipeline of that base loads what comes out, and draws otherwise with it."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image, ImageOps
from tiny_bases import SIDE, Tiny

from unbraid.bases.base import Base, load
from unbraid.bases.presets import Loading
from unbraid.files.lora_file import read
from unbraid.methods import METHODS
from unbraid.runs import run as running
from unbraid.runs.api import learn_job, pair_job, split_job, zip_job
from unbraid.runs.job import Job
from unbraid.runs.memory import estimate
from unbraid.runs.modules import break_job, make_job
from unbraid.sampling.render import Use, render

pytestmark = pytest.mark.slow

BASES = (
    ("tiny_sdxl", "folder"),
    ("tiny_sdxl", "file"),
    ("tiny_sd15", "folder"),
    ("tiny_sd15", "file"),
    ("tiny_v", "file"),
)


def stock(tiny: Tiny, which: str, sdxl: bool) -> Any:
    """The base in diffusers alone."""
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


def done(job: Job, device: str = "cpu") -> Path:
    if "tiny_sdxl" in job.base and job.base.endswith(
        ".safetensors"
    ):  # one base is enough: the command line prints it of every run
        told = estimate(job, "cpu")
        assert told.weights > 0 and told.adapters > 0 and (told.activations > 0) == (job.method != "np-lora")
    list(running.run(job, device=device))
    return job.out


def everything(base: str, picture: Path, out: Path, device: str = "cpu") -> dict[str, list[Path]]:
    """Method → the files that it made, by the shortest runs that there are."""
    after = out / "after.png"
    with Image.open(picture) as image:
        ImageOps.invert(image.convert("RGB")).save(after)
    (out / "partners").mkdir()
    for kind, text in (("content", "a teapot in red style"), ("style", "a teapot")):
        (out / "partners" / kind).mkdir()
        Image.new("RGB", (SIDE, SIDE), "red").save(out / "partners" / kind / "a.png")
        (out / "partners" / kind / "a.txt").write_text(text)
    common: dict[str, Any] = {"base": base, "previews": 0}
    quick: dict[str, Any] = {**common, "rank": 2, "steps": 2}
    words = {"subject": "cat", "style": "ink"}
    lr = {"content_lr": 1e-2, "style_lr": 1e-2, "window": 1, "sample_times": 1, "column_ratio": 0.5}
    unzip = done(split_job(picture, **words, **quick, **lr, out=out / "unziplora"), device)
    blora = done(split_job(picture, **words, **quick, lr=1e-2, method="blora", out=out / "blora"), device)
    pair = done(pair_job(picture, after, **words, **quick, lr=1e-2, style_from=0, out=out / "pair"), device)
    slider = done(pair_job(picture, after, **words, **quick, lr=1e-2, method="slider", out=out / "slider"), device)
    learn = done(learn_job(picture, prompt="a sks cat", **quick, lr=1e-2, out=out / "dreambooth"), device)
    two = (unzip / "content.safetensors", unzip / "style.safetensors")
    images = {"content": picture, "style": after}
    zipped = done(zip_job(*two, images=images, **common, steps=2, out=out / "ziplora"), device)
    projected = done(zip_job(*two, images=images, method="np-lora", **common, out=out / "np-lora"), device)
    broken = []
    for kind, prompt, image in (("content", "a sks cat", picture), ("style", "a dog in ink style", after)):
        more = {"partners": out / "partners" / kind, "partner_count": 1, "lr": 1e-1, "out": out / f"break-{kind}"}
        broken.append(done(break_job(image, kind=kind, prompt=prompt, **quick, **more), device))  # type: ignore[arg-type]
    make = done(make_job(*broken, fine_tune=2, images=images, **common, out=out / "make"), device)
    return {
        "unziplora": list(unzip.glob("*.safetensors")),
        "blora": list(blora.glob("*.safetensors")),
        "pair": list(pair.glob("*.safetensors")),
        "slider": list(slider.glob("*.safetensors")),
        "dreambooth": list(learn.glob("*.safetensors")),
        "ziplora": list(zipped.glob("*.safetensors")),
        "np-lora": list(projected.glob("*.safetensors")),
        "break": [file for folder in broken for file in folder.glob("*.safetensors")],
        "make": list(make.glob("*.safetensors")),
    }


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run has a base of its own, but the files are read once."""
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
    made = everything(str(getattr(tiny, which)), picture, tmp_path)
    assert made.keys() == METHODS.keys() and all(made.values())
    pipe = stock(tiny, which, sdxl=kind != "tiny_sd15")
    plain = stock_picture(pipe)
    for method, files in made.items():
        assert len(files) == (1 if method in ("slider", "dreambooth", "make") else 2), method
        for file in files:
            assert read(file).family == ("sd15" if kind == "tiny_sd15" else "sdxl")
            with loaded(pipe, file):
                change = np.abs(stock_picture(pipe) - plain).max()
                assert change > 2, f"{method}: {file.name} changes {change} of 255 levels"
    assert np.abs(stock_picture(pipe) - plain).max() <= 1, "and it is gone when it is unloaded"
    file = made["dreambooth"][0]
    with loaded(pipe, file):
        theirs = stock_picture(pipe)
    base = load(str(getattr(tiny, which)), "cpu")
    ours = render(base, "a sks cat in ink style", [Use(file)], steps=2)[0]
    assert np.abs(np.asarray(ours).astype(int) - theirs).max() <= 2
