"""Block swap on a device that is not the CPU: the same losses and LoRAs, and no more weights there than promised."""

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers as tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from second_device import allocated, host_copies, second
from tiny_bases import Tiny

from unbraid.bases.base import Base, load
from unbraid.bases.families.family import Network
from unbraid.bases.presets import Loading
from unbraid.bases.savings import notes, save_memory, swapped_blocks
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active
from unbraid.core.swap import Swap, evenly, frozen_bytes
from unbraid.runs import folder
from unbraid.runs import run as running
from unbraid.runs.api import learn_job, pair_job, split_job
from unbraid.runs.job import Job
from unbraid.runs.memory import estimate, memory_line
from unbraid.runs.run import run
from unbraid.sampling.render import Sampling, Use, render

__all__ = ["second"]  # a fixture
pytestmark = pytest.mark.slow
MAKERS: Mapping[str, Callable[[], Any]] = {
    "flux": tiny.flux,
    "sd35": tiny.sd35,
}
RUN: Mapping[str, Any] = {"rank": 2, "previews": 0, "steps": 3}


@pytest.fixture(scope="module", params=[*MAKERS, "sdxl"])
def base_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "sdxl":
        found: Tiny = request.getfixturevalue("tiny_sdxl")
        return found.folder
    return tiny.save(MAKERS[request.param](), tmp_path_factory.mktemp("swap") / request.param)


def blocks_of(base: Base) -> list[torch.nn.Module]:
    network: Network = base.family.network
    return [one for one in base.denoiser.modules() if isinstance(one, network.blocks)]


def losses(job: Job) -> list[Any]:
    lines = (job.out / folder.EVENTS).read_text().splitlines()
    return [one["losses"] for one in map(json.loads, lines) if "losses" in one]


def same(one: Job, other: Job) -> None:
    assert losses(one) and losses(one) == losses(other)
    files = sorted(one.out.glob("*.safetensors"))
    assert files
    for file in files:
        first, again = load_file(file), load_file(other.out / file.name)
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("vram", ["max", "8"])
def test_losses_and_loras_are_those_without_it(
    second: str, base_folder: Path, vram: str, picture: Path, tmp_path: Path
) -> None:
    """Gradient checkpointing is on in both; the second run copies two or three blocks in each pass."""
    jobs = []
    for name, swap in (("without", 0), ("with", 2 if base_folder.name == "sd35" else 3)):
        words = {"subject": "cat", "style": "ink"}
        job = split_job(picture, **words, base=str(base_folder), out=tmp_path / name, vram=vram, swap=swap, **RUN)
        jobs.append(job)
        list(run(job, device=second))
    same(*jobs)


@pytest.mark.parametrize("base_folder", ["flux"], indirect=True)
@pytest.mark.parametrize("method", ["pair", "qr-lora"])
def test_methods_that_look_at_weights(
    second: str, base_folder: Path, method: str, picture: Path, tmp_path: Path
) -> None:
    jobs = []
    for name, swap in (("without", 0), ("with", 4)):
        given: dict[str, Any] = {"base": str(base_folder), "out": tmp_path / name, "vram": "16", "swap": swap, **RUN}
        if method == "pair":
            after = tmp_path / "after.png"
            Image.open(picture).convert("L").save(after)
            job = pair_job(picture, after, subject="cat", style="ink", style_from=1, lr=1e-3, **given)
        else:
            job = learn_job(picture, prompt="a sks cat", method=method, **given)
        jobs.append(job)
        list(run(job, device=second))
    same(*jobs)


def test_pictures_are_those_without_it(second: str, base_folder: Path, picture: Path, tmp_path: Path) -> None:
    job = learn_job(picture, prompt="a sks cat", base=str(base_folder), out=tmp_path / "run", lr=1e-2, **RUN)
    list(run(job, device=second))
    lora, made = job.out / "lora.safetensors", []
    for swap in (0, 2):
        base = load(str(base_folder), second, Loading(swap=swap))
        made.append(np.asarray(render(base, "a cat", [Use(lora)], sampling=Sampling(steps=2))[0]))
    assert np.array_equal(*made)


def conditions(base: Base) -> tuple[Any, ...]:
    """Latents, time, prompts and sizes for a prediction."""
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(base.device)
    time, sizes = torch.full((1,), 500.0, device=base.device), torch.zeros(1, 6, device=base.device)
    return latents, time, [base.encode_prompt("a cat")], sizes


def with_adapters(base: Base) -> Adapters:
    adapters = Adapters.attach(base.denoiser, kinds=base.family.network.layers)
    adapters.new("lora", 2, torch.Generator().manual_seed(0), up_std=0.1)
    return adapters


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_how_many_weights_are_on_the_device(second: str, count: int, tmp_path: Path) -> None:
    """At most two blocks' weights beside those that are not swapped, in forward and backward pass."""
    where, size, more = str(tiny.save(tiny.flux(), tmp_path / "base")), dict[int, int](), dict[int, int]()
    sizes = [frozen_bytes(one) for one in blocks_of(load(where, "cpu"))]
    for swap in (0, count):
        gc.collect()
        before = allocated()
        base: Any = load(where, second, Loading(swap=swap))
        size[swap] = allocated() - before
        save_memory(base.denoiser, base.device, Loading(swap=1).preset)  # gradient checkpointing without swapping, too
        more[swap], here = looked_at(base)
        assert len(here) == 8 and max(here) <= 4 - swap + bool(swap), "checkpointed blocks run again"
        assert sum(map(is_on_device, blocks_of(base))) == 4 - swap
        base = None
    away = [sizes[i] for i in evenly(count, 4)]
    saved = sum(away) - min(2, count) * max(away)
    assert abs(size[0] - size[count] - saved) < 0.02 * size[0], (size, saved)
    assert abs(more[0] - more[count]) < 0.1 * min(sizes), "weights are copied into the two buffers alone"


def is_on_device(block: torch.nn.Module) -> bool:
    return all(p.device.type != "cpu" for p in block.parameters())


def looked_at(base: Base) -> tuple[int, list[int]]:
    """Bytes that a step of training needs beside the weights, and how many blocks are on the device while each block runs."""
    adapters, blocks, here, most = with_adapters(base), blocks_of(base), list[int](), list[int]()

    def look(*_: Any) -> None:
        here.append(sum(map(is_on_device, blocks)))
        most.append(allocated())

    for one in blocks:
        next(m for m in one.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(look)
    given, begin = conditions(base), allocated()
    with adapters.activate([(Active("lora"),)]):
        base.predict(*given).square().mean().backward()
    trained = [p for one in adapters.of("lora").values() for _, p in one.parts()]
    assert all(p.device.type != "cpu" and p.grad is not None for p in trained)
    return max(most) - begin, here


def test_each_block_is_copied_once_per_pass(second: str, tmp_path: Path) -> None:
    where, found = str(tiny.save(tiny.flux(), tmp_path / "base")), dict[int, int]()
    for swap in (0, 3):
        base = load(where, second, Loading(swap=swap))
        given = conditions(base)
        with torch.no_grad():
            base.predict(*given)  # fills the buffers
            with host_copies() as copies:
                base.predict(*given)
        found[swap] = copies.from_host
    assert found[3] - found[0] == 3


@pytest.mark.parametrize("make", [tiny.z_image, tiny.flux])
def test_gradients_with_buffers_in_the_same_memory(make: Callable[[], Any], tmp_path: Path) -> None:
    """On the CPU, for networks with operators that the second device lacks."""
    where, found = str(tiny.save(make(), tmp_path / "base")), []
    for swap in (0, 3):
        base = load(where, "cpu", Loading(swap=3))  # on the CPU, gradient checkpointing alone
        if swap:
            with Swap(swapped_blocks(base.denoiser, base.family.network, swap), base.device).put_aside():
                base.denoiser.to("cpu")
        adapters = with_adapters(base)
        with adapters.activate([(Active("lora"),)]):
            out = base.predict(*conditions(base))
            out.square().mean().backward()
        found.append([out.detach(), *(p.grad for one in adapters.of("lora").values() for _, p in one.parts())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_is_refused_and_said(picture: Path, tmp_path: Path) -> None:
    base = str(tiny.save(tiny.z_image(), tmp_path / "base"))
    for swap in (-1, 5):
        with pytest.raises(UsageError, match="transformer has 4 blocks: give 0 to 4") as error:
            load(base, "cpu", Loading(swap=swap))
        assert "--swap" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match="compiled blocks"):
        load(base, "cpu", Loading(swap=1, compile=True))
    job = learn_job(picture, prompt="a sks cat", base=base, out=tmp_path / "run", swap=2, **RUN)
    assert [one.warning for one in run(job, device="cpu") if one.warning] == [
        "--swap on cpu has no other memory to swap to: it only switches gradient checkpointing on"
    ]
    said = notes(torch.device("cuda"), Loading(swap=2))
    assert said == ["--swap: no CUDA graphs, because weights are copied in the middle of a step"]
    assert not notes(torch.device("cuda"), Loading(swap=2, graphs=False))


def test_the_estimate_knows_it(picture: Path, tmp_path: Path) -> None:
    base = str(tiny.save(tiny.z_image(), tmp_path / "base"))
    job = learn_job(picture, prompt="a sks cat", base=base, out=tmp_path / "run", vram="24", **RUN)
    found = {n: estimate(replace(job, loading=replace(job.loading, swap=n)), "cuda") for n in (0, 2, 3, 4)}
    sizes = [frozen_bytes(one) for one in blocks_of(load(base, "cpu", Loading(vram="24")))]
    away = [sizes[i] for i in evenly(3, 4)]
    assert found[0].weights - found[3].weights == sum(away) - 2 * max(away) > 0
    assert found[4].weights < found[3].weights < found[0].weights
    assert found[3].activations < found[0].activations, "gradient checkpointing"
    assert "--vram 24 --swap 3" in memory_line(replace(job, loading=replace(job.loading, swap=3)))
    with pytest.raises(UsageError, match="give 0 to 4"):
        estimate(replace(job, loading=replace(job.loading, swap=9)), "cuda")


def test_a_run_may_go_on_with_another_number(second: str, picture: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("unbraid.runs.pace.SAVE_EVERY", 0.0)
    base = str(tiny.save(tiny.flux(), tmp_path / "base"))
    jobs = [
        learn_job(picture, prompt="a sks cat", base=base, out=tmp_path / name, vram="16", swap=swap, **RUN)
        for name, swap in (("whole", 3), ("cut", 0))
    ]
    list(run(jobs[0], device=second))
    going: Any = running.run(jobs[1], device=second)
    while not (event := next(going)).step or event.done < 2:
        pass
    going.close()
    list(run(replace(jobs[1], loading=replace(jobs[1].loading, swap=2)), resume=True, device=second))
    one, other = (load_file(job.out / "lora.safetensors") for job in jobs)
    assert all(torch.equal(one[key], other[key]) for key in one)
