"""After any error in the middle of any verb, the base has no adapters attached."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_every_base import material
from test_second_device import random_loras
from torch import nn

from tools.speed.gpu import whole_run
from tools.speed.time import timed
from tools.speed.workload import Workload
from unbraid.bases.base import Base, load
from unbraid.common.errors import UsageError
from unbraid.core.adapters import AdaptedLinear
from unbraid.methods import METHODS
from unbraid.methods.entry import ROLES
from unbraid.runs import shortest
from unbraid.runs.batch import batch
from unbraid.runs.job import Job
from unbraid.runs.run import run
from unbraid.sampling.render import Sampling, Use, render


class Broken(Exception):
    """An error that unbraid does not expect."""


@contextmanager
def broken(module: nn.Module, call: int, error: type[BaseException]) -> Iterator[None]:
    """The n-th call of the function raises."""
    left = [call]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise error

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def bare(base: Base) -> bool:
    return not any(isinstance(module, AdaptedLinear) for module in base.denoiser.modules())


@pytest.fixture
def base(eps_base: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """The base that all runs of a test use."""
    found = load(str(eps_base), "cpu")
    for module in ("unbraid.runs.run", "unbraid.runs.batch"):
        monkeypatch.setattr(f"{module}.load", lambda *_: found)
    return found


@pytest.fixture(scope="module")
def files(eps_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Method → two random files of it, for the base."""
    base, made = load(str(eps_base), "cpu"), {}
    for method in ("dreambooth", "break"):
        made[method] = random_loras(base, tmp_path_factory.mktemp(method), method)
    return made


@pytest.fixture
def loras(files: dict[str, list[Path]]) -> list[Path]:
    return files["dreambooth"]


def job(method: str, base: Base, files: dict[str, list[Path]], picture: Path, out: Path) -> Job:
    """A job with previews. If its LoRAs are trained on pictures, they draw these themselves."""
    loras, modules = files["dreambooth"], files["break"]
    given = replace(
        material(picture, out),
        loras=dict(zip(ROLES, loras, strict=True)),
        modules=dict(zip(ROLES, modules, strict=True)),
    )
    more = {"images": {}} if method == "ziplora" else {}
    return shortest.jobs(method, given, out, base=base.name, out=out / "run", previews=1, **more)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "call", "error"),
    [("vae", 1, Broken), ("vae", 1, KeyboardInterrupt), ("unet", 1, torch.OutOfMemoryError), ("unet", 8, Broken)],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_breaks(
    method: str,
    part: str,
    call: int,
    error: Any,
    base: Base,
    files: dict[str, list[Path]],
    picture: Path,
    tmp_path: Path,
) -> None:
    """The error comes while pictures are encoded or drawn by the LoRAs, in a step, in a preview, or on the sheet."""
    measure = job(method, base, files, picture, tmp_path)
    module: Any = base.denoiser if part == "unet" else base.vae.encoder
    with (
        suppress(Broken, KeyboardInterrupt, UsageError),
        broken(module, call, error),
    ):  # runs with fewer calls end normally
        list(run(measure, device="cpu"))
    assert bare(base)


@pytest.mark.parametrize("call", [1, 2])
def test_runs_together_that_break(
    call: int, base: Base, files: dict[str, list[Path]], picture: Path, tmp_path: Path
) -> None:
    jobs = []
    for method in ("unziplora", "dreambooth"):
        (tmp_path / method).mkdir()
        jobs.append(job(method, base, files, picture, tmp_path / method))
    with broken(base.denoiser, call, Broken), pytest.raises(Broken):
        batch(jobs, device="cpu")
    assert bare(base)


@pytest.mark.parametrize("combine", ["sum", "k-lora", "switch", "composite"])
def test_a_drawing_that_breaks(combine: Any, base: Base, loras: list[Path]) -> None:
    with broken(base.denoiser, 2, Broken), pytest.raises(Broken):
        render(base, "a cat", [Use(file) for file in loras], combine=combine, sampling=Sampling(steps=3))
    assert bare(base)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3, 6, 10])
def test_a_bench_that_breaks(base: Base, call: int) -> None:
    pixels = torch.rand(3, base.size, base.size)
    picture = base.encode_picture(pixels, (32, 32, 0, 0, 32, 32))
    prompts = {role: base.encode_prompt(f"a {role}") for role in ("both", "content", "style")}
    workload = Workload(base, prompts, lambda roles: {role: [picture] for role in roles}, 2, "tiny")
    before = base.denoiser.training
    for measure in (lambda: timed("zip", workload, 2, 1, 0), lambda: whole_run("pair", workload)):
        with broken(base.denoiser, call, Broken), pytest.raises(Broken):
            measure()
        assert bare(base) and not base.denoiser.is_gradient_checkpointing and base.denoiser.training == before
