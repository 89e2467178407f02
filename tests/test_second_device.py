"""Everything on a device that is not the CPU, from start to written file, with the same results as the CPU up to rounding."""

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from second_device import host_copies, second
from test_canvas import controlnet
from test_every_base import everything, loaded_once
from tiny_bases import Tiny
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.speed.time import timed
from tools.speed.workload import Workload
from unbraid.bases.base import Base, load
from unbraid.bases.presets import PRESETS, Loading
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Lora
from unbraid.files.lora_file import read, write
from unbraid.methods import METHODS
from unbraid.methods.b4m import CUT, break_
from unbraid.runs import folder
from unbraid.runs.api import learn_job, pair_job, split_job
from unbraid.runs.batch import batch
from unbraid.runs.job import Job
from unbraid.runs.run import run
from unbraid.sampling.canvas import Control, Start
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, Use, render

MACHINE = ("time", "rate", "memory")  # in events: what differs from run to run
pytestmark = pytest.mark.slow

__all__ = ["loaded_once", "second"]  # fixtures
KINDS = ("tiny_sdxl", "tiny_sd15")
CUTS = {key: inspect.signature(break_).parameters[key].default for key in CUT}


@pytest.fixture(autouse=True)
def written_out() -> Iterator[None]:
    """Attention as it is computed on the device, so that numbers on the CPU are the same."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.getfixturevalue(request.param)


def close(one: Path, other: Path) -> None:
    """Check that LoRAs are the same up to rounding, which AdamW amplifies."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    a, b = (torch.cat([value.flatten().double() for value in some.values()]) for some in (first, second))
    assert (a - b).norm() < 2e-3 * a.norm(), one


# ---- the device itself


def test_it_refuses_what_cuda_refuses(second: str) -> None:
    x, here = torch.ones(3, 3, device=second), torch.ones(3, 3)
    wrong: list[Callable[[], Any]] = [
        lambda: x.numpy(),
        lambda: x + here,
        lambda: here.add_(x),
        lambda: x @ here,
        lambda: torch.cat([x, here]),
        lambda: torch.where(x > 0, x, here),
        lambda: torch.nn.functional.conv2d(x[None, None], here[None, None]),
        lambda: torch.randn(3, device=second, generator=torch.Generator()),
        lambda: here.index_copy_(0, torch.tensor([0], device=second), x[:1]),
        lambda: torch._foreach_add_([x], [here]),
    ]
    for one in wrong:
        with pytest.raises((RuntimeError, TypeError), match=r"same device|numpy|generator|second"):
            one()
    assert torch.equal((x * torch.tensor(2.0))[torch.tensor([0])].cpu(), 2 * here[:1])  # as on CUDA


def test_it_counts_what_the_host_waits_for(second: str) -> None:
    x = torch.arange(6.0, device=second)
    with host_copies() as none:
        ((x * 2).sum() + x[1:3].mean()).sqrt()
    with host_copies() as some:
        seen = float(x[1]), x.cpu(), x.tolist(), bool((x > 0).any()), x.nonzero(), x.equal(x)
    assert len(seen) == 6
    with host_copies() as given:
        torch.tensor([1.0, 2.0], device=second)
    assert (none.to_host, none.from_host, some.to_host, given.to_host) == (0, 0, 6, 0) and given.from_host == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_numbers_are_the_cpus(second: str, dtype: torch.dtype) -> None:
    """Forward pass, backward pass and optimiser step of a network with all operators of a UNet."""
    torch.manual_seed(0)
    net: Any = torch.nn.ModuleDict(
        {
            "conv": torch.nn.Conv2d(4, 8, 3, padding=1),
            "norm": torch.nn.GroupNorm(2, 8),
            "layer": torch.nn.LayerNorm(8),
            "out": torch.nn.Linear(8, 8),
        }
    ).to(dtype)
    x = torch.randn(2, 4, 6, 6).to(dtype)

    def step(net: Any, x: torch.Tensor) -> list[torch.Tensor]:
        y = net["norm"](net["conv"](x)).flatten(2).mT
        y = torch.nn.functional.scaled_dot_product_attention(y[:, None], y[:, None], net["layer"](y)[:, None])[:, 0]
        y = torch.nn.functional.interpolate(net["out"](y).mT.unflatten(2, (6, 6)), scale_factor=2.0)
        y.float().pow(2).mean().backward()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3, foreach=True)
        optimizer.step()
        stored = x.to(torch.float8_e4m3fn).to(dtype)
        return [y.detach(), stored, *(p.grad for p in net.parameters()), *(p.detach() for p in net.parameters())]

    theirs, ours = step(copy.deepcopy(net).to(second), x.to(second)), step(net, x)
    for one, other in zip(ours, theirs, strict=True):
        assert other.device.type == second and other.dtype == one.dtype
        torch.testing.assert_close(other.cpu(), one, atol=2e-3 if dtype == torch.float32 else 3e-2, rtol=1e-2)


# ---- training


@pytest.mark.usefixtures("loaded_once")
def test_every_method_from_start_to_file(second: str, tiny: Tiny, picture: Path, tmp_path: Path) -> None:
    devices = (
        ("cpu", second) if tiny.folder.parent.name.startswith("tiny_sdxl") else (second,)
    )  # on the CPU for one base only
    found = {}
    for device in devices:
        (tmp_path / device).mkdir()
        found[device] = everything(str(tiny.folder), picture, tmp_path / device, device)
    assert found[second].keys() == METHODS.keys() and all(found[second].values())
    for file in (file for files in found[second].values() for file in files):
        assert read(file).modules
        if "cpu" in found:
            close(tmp_path / "cpu" / file.relative_to(tmp_path / second), file)


def split(base: Path, picture: Path, out: Path, **more: Any) -> Job:
    lr = {"content_lr": 1e-3, "style_lr": 1e-3, "window": 1, "sample_times": 1, "column_ratio": 0.5}
    given = {"rank": 2, "previews": 0, "steps": 4, **lr, **more}
    return split_job(picture, subject="cat", style="ink", base=str(base), out=out, **given)


def figures(run_folder: Path) -> list[dict[str, Any]]:
    """The events of a run, without what depends on the machine."""
    lines = (run_folder / folder.EVENTS).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MACHINE} for line in lines]


def test_interrupted_and_resumed_it_is_the_same(
    second: str, tiny: Tiny, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbraid.runs.pace.SAVE_EVERY", 0.0)
    whole, cut = (split(tiny.folder, picture, tmp_path / name, previews=1) for name in ("whole", "cut"))
    list(run(whole, device=second))
    going: Any = run(cut, device=second)
    while not (event := next(going)).step or event.done < 3:
        pass
    going.close()
    assert (cut.out / folder.STATE).exists()
    list(run(cut, resume=True, device=second))
    for name in ("content", "style"):
        one, other = (load_file(job.out / f"{name}.safetensors") for job in (whole, cut))
        assert one and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert figures(whole.out) == figures(cut.out)
    assert (cut.out / "sheet.png").exists() and list((cut.out / "previews").iterdir())


@pytest.mark.parametrize("vram", PRESETS)
def test_every_preset(second: str, vram: str, tiny_sdxl: Tiny, picture: Path, tmp_path: Path) -> None:
    job = replace(split(tiny_sdxl.folder, picture, tmp_path / "out", steps=2), loading=Loading(vram=vram))
    list(run(job, device=second))
    for name in ("content", "style"):
        assert read(job.out / f"{name}.safetensors").modules


def test_several_runs_at_once(second: str, tiny_sdxl: Tiny, picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.open(picture).convert("L").save(other)
    common: dict[str, Any] = {"base": str(tiny_sdxl.folder), "previews": 0, "rank": 2}
    words = {"subject": "cat", "style": "ink"}
    jobs = [
        split(tiny_sdxl.folder, picture, tmp_path / "a", steps=2),
        pair_job(picture, other, **words, out=tmp_path / "b", steps=2, style_from=1, lr=1e-3, **common),
        learn_job(other, prompt="a sks cat", out=tmp_path / "c", steps=3, lr=1e-3, **common),
    ]
    batch(jobs, device=second)
    assert all(list(job.out.glob("*.safetensors")) for job in jobs)


@pytest.mark.parametrize("name", ["split", "zip", "pair"])
def test_the_published_steps_of_the_bench(second: str, name: str, tiny_sdxl: Tiny) -> None:
    """In half precision, as on a GPU, with pictures encoded at every step."""
    base = load(str(tiny_sdxl.folder), second, Loading(vram="24"))
    pixels = torch.rand(3, base.size, base.size) * 2 - 1
    picture, roles = base.encode_picture(pixels, (64, 64, 0, 0, 64, 64)), ("both", "content", "style")
    prompts = {role: base.encode_prompt(f"a {role}") for role in roles}
    workload = Workload(base, prompts, lambda roles: {role: [picture] for role in roles}, 2, "tiny")
    assert all(seconds > 0 for _, seconds in timed(name, workload, 2, 1, 0))


# ---- drawing


def random_loras(base: Base, out: Path, method: str = "dreambooth") -> list[Path]:
    """Two random LoRAs for the base."""
    files, adapters = [], Adapters.attach(copy.deepcopy(base.denoiser))
    for i, name in enumerate(("content", "style")):
        adapters.new(name, 4, torch.Generator().manual_seed(i), up_std=0.1)
        modules: dict[str, Lora] = {f"unet.{layer}": one for layer, one in adapters.folded(name).items()}
        metadata = {
            "unbraid.prompt": f"a {name}",
            "unbraid.style": "ink",
            "unbraid.method": method,
            "unbraid.base": base.name,
        }
        metadata["unbraid.settings"] = json.dumps({**CUTS, "kind": name, "rank": 4})
        files.append(out / f"{name}.safetensors")
        write(files[-1], modules, family=base.family.name, metadata=metadata)
    return files


@pytest.fixture(scope="session", params=KINDS)
def drawn(request: pytest.FixtureRequest, second: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same base on both devices, and two LoRAs for it."""
    tiny: Tiny = request.getfixturevalue(request.param)
    here, there = load(str(tiny.folder), "cpu"), load(str(tiny.folder), second)
    files = random_loras(here, tmp_path_factory.mktemp("loras"))
    return here, there, files


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    image = Image.new("L", (48, 48))
    ImageDraw.Draw(image).rectangle((24, 0, 48, 48), fill=255)
    image.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def same_picture(drawn: Any, **settings: Any) -> None:
    here, there, _ = drawn
    settings = {"sampling": Sampling(steps=2), **settings}
    ours, theirs = (np.asarray(render(base, "a cat", **settings)[0]).astype(int) for base in (there, here))
    assert theirs.std() > 1 and np.abs(ours - theirs).max() <= 2


FORMULAS: dict[str, Callable[[Use, Use], dict[str, Any]]] = {
    "classifier-free": lambda content, style: {},
    "a LoRA": lambda content, style: {"uses": [content]},
    "its own prompt": lambda content, style: {"uses": [content, Use(style.file, 0.5, prompt="own")]},
    "style guidance": lambda content, style: {"styles": StyleGuidance([style])},
    "several styles": lambda content, style: {
        "uses": [content],
        "styles": StyleGuidance([style, Use(content.file, 0.5)]),
    },
    "style from 0.6": lambda content, style: {
        "styles": StyleGuidance([style], begin=0.6),
        "sampling": Sampling(steps=2, negative="blurry"),
    },
    "k-lora": lambda content, style: {"uses": [content, style], "combine": "k-lora"},
    "switch": lambda content, style: {"uses": [content, style], "combine": "switch"},
    "composite": lambda content, style: {"uses": [content, style], "combine": "composite"},
}


@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula(drawn: Any, name: str) -> None:
    content, style = map(Use, drawn[2])
    same_picture(drawn, **FORMULAS[name](content, style))


@pytest.mark.parametrize("sampler", ["euler", "dpm++", "ddim"])
def test_samplers(drawn: Any, sampler: str) -> None:
    same_picture(drawn, sampling=Sampling(steps=2, sampler=sampler))


def test_drawing_on_a_picture_and_on_a_part_of_it(drawn: Any, picture: Path, mask: Path) -> None:
    content = Use(drawn[2][0])
    same_picture(drawn, uses=[content], inputs=ImageInputs(Start(picture, 0.7)))
    same_picture(drawn, uses=[content], inputs=ImageInputs(Start(picture, 0.7, mask)))


def test_drawing_after_a_map(drawn: Any, picture: Path, tmp_path: Path) -> None:
    net = controlnet(drawn[0], tmp_path / "net")
    inputs = ImageInputs(control=Control(str(net), picture, 0.8))
    same_picture(drawn, styles=StyleGuidance([Use(drawn[2][1])]), inputs=inputs)


def test_editing(drawn: Any, picture: Path) -> None:
    styles = StyleGuidance([Use(drawn[2][1])])
    same_picture(drawn, styles=styles, inputs=ImageInputs(edit=picture), sampling=Sampling(steps=3))


def test_the_autoencoder_comes_and_goes(drawn: Any) -> None:
    """The autoencoder is on the device only while pictures are encoded or drawn."""
    there: Base = copy.copy(drawn[1])
    there.pipe = copy.copy(there.pipe)
    there.release()
    assert there.vae.device.type == "cpu"
    there.vae.to(there.device)  # type: ignore[arg-type]
