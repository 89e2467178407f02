"""Memory presets: the estimate compared with real use, equal gradients, whole runs, and the error when memory is full."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm import save_header
from PIL import Image
from test_sniff import real_size
from tiny_bases import Tiny, sdxl
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unbraid.bases.base import Base, load
from unbraid.bases.presets import PRESETS, Loading
from unbraid.bases.savings import save_memory
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active
from unbraid.core.optim8 import AdamW8
from unbraid.core.train import train
from unbraid.files.lora_file import read
from unbraid.runs import run as running
from unbraid.runs.api import split_job
from unbraid.runs.job import opened_images, prompts_of
from unbraid.runs.memory import GIB, estimate, memory_line
from unbraid.runs.prepare import prepare

QUICK = {"rank": 2, "steps": 4, "window": 1, "sample_times": 1, "content_lr": 1e-3, "style_lr": 1e-3, "previews": 0}


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are alive: now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and id(storage) not in given and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
                self.peak = max(self.peak, self.now)
        return out

    def free(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL for pictures of 512 px, so that activations are most of the memory."""
    pipe: Any = sdxl()
    pipe.unet.register_to_config(sample_size=64)
    out = tmp_path_factory.mktemp("wide")
    pipe.save_pretrained(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("vram", ["max", "16"])
def test_the_estimate_is_what_a_step_takes(vram: str, wide: Path, tmp_path: Path) -> None:
    """The peak of all storages in a real step on the CPU is that of activations and gradients."""
    Image.new("RGB", (512, 512), "red").save(tmp_path / "x.png")
    options = {**QUICK, "rank": 8, "base": str(wide), "vram": vram}
    job = split_job(tmp_path / "x.png", subject="cat", style="ink", **options)
    estimated = estimate(job, "cpu")
    ready = prepare(job, prompts_of(job), opened_images(job), load(job.base, "cpu", job.loading))
    assert ready.base.dtype == ready.base.denoiser.dtype == (torch.float32 if vram == "max" else torch.bfloat16)
    trained = [p for name in ready.adapters.names for one in ready.adapters.of(name).values() for _, p in one.parts()]
    frozen = [p for p in ready.base.denoiser.parameters() if not any(p is one for one in trained)]
    assert estimated.weights == sum(p.numel() * p.element_size() for p in frozen)
    size = sum(4 * p.numel() for p in trained)
    assert estimated.adapters == 4 * size
    with Live() as live:
        next(train(ready.run_data, ready.recipe, ready.state, 1))
    assert live.peak > 5 * size, "activations must be most of it, or this shows nothing"
    assert 0.85 < (estimated.activations + size) / live.peak < 1.35


@pytest.mark.slow
def test_fp8_weights_are_counted_as_they_are(tiny_sdxl: Tiny, picture: Path) -> None:
    job = split_job(picture, subject="cat", style="ink", base=str(tiny_sdxl.file), vram="8", **QUICK)
    base = load(str(tiny_sdxl.file), "cpu", Loading(vram="8"))
    kept = [*base.denoiser.parameters(), *base.denoiser.buffers()]
    Adapters.attach(base.denoiser).new("one", 4, torch.Generator().manual_seed(1))
    assert base.dtype == base.denoiser.dtype == torch.bfloat16, "adapters are in full precision"
    assert estimate(job, "cpu").weights == sum(one.nbytes for one in kept)
    assert {one.dtype for one in kept} == {torch.float8_e4m3fn, torch.bfloat16}
    assert sum(one.nbytes for one in kept if one.dtype == torch.float8_e4m3fn) > 0.4 * sum(one.nbytes for one in kept)


@pytest.mark.slow
def test_real_sdxl_fits_by_the_estimate(picture: Path, tmp_path: Path) -> None:
    """From a header of the real size, with the advised ranks. The rest of the card is for the driver, encoding and drawing."""
    file = save_header(real_size("sdxl"), tmp_path / "model.safetensors")
    for name in ("24", "8"):
        rank = PRESETS[name].rank
        job = split_job(picture, subject="cat", style="ink", base=str(file), vram=name, rank=rank)
        assert estimate(job, "cpu").total < 0.75 * int(name) * GIB, memory_line(job)


@pytest.mark.slow
def test_presets_save_and_advise(tiny_sdxl: Tiny, picture: Path) -> None:
    options = {"subject": "cat", "style": "ink", "base": str(tiny_sdxl.file), "rank": 32}
    jobs = {name: split_job(picture, vram=name, **options) for name in ("max", "12", "8")}
    totals = [estimate(job, "cpu").total for job in jobs.values()]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)
    assert "at this preset, ranks up to 16 are advised: --set rank=16" in memory_line(jobs["8"])
    assert "advised" not in memory_line(jobs["12"])


def gradients(preset: str, rounded: bool = False) -> Tensor:
    """The gradients of a tiny SDXL's adapters, in bf16."""
    unet: Any = sdxl().unet.requires_grad_(False)
    unet.to(torch.bfloat16)
    if rounded:
        state = load_rounded(unet)
        unet.load_state_dict(state)
    else:
        save_memory(unet, torch.device("cpu"), PRESETS[preset])
    size = sum(one.nbytes for one in frozen(unet))
    adapters = Adapters.attach(unet)
    adapters.new("one", 4, torch.Generator().manual_seed(1), up_std=0.1)
    rng = torch.Generator().manual_seed(2)
    added = {"text_embeds": torch.randn(1, 64, generator=rng).bfloat16(), "time_ids": torch.zeros(1, 6)}
    x, text = torch.randn(1, 4, 8, 8, generator=rng).bfloat16(), torch.randn(1, 77, 96, generator=rng).bfloat16()
    with adapters.activate([(Active("one"),)]):
        out = unet(x, torch.tensor([500]), encoder_hidden_states=text, added_cond_kwargs=added).sample
        out.float().square().mean().backward()
    assert size == sum(one.nbytes for one in frozen(unet)), "fp8 weights stay in fp8"
    return torch.cat(
        [p.grad.flatten() for one in adapters.of("one").values() for _, p in one.parts() if p.grad is not None]
    )


def frozen(unet: nn.Module) -> list[Tensor]:
    return [one for one in (*unet.parameters(), *unet.buffers()) if not one.requires_grad]


def load_rounded(unet: nn.Module) -> dict[str, Tensor]:
    """Load a base in bf16 with weights rounded to fp8."""
    cast: Any = sdxl().unet.to(torch.bfloat16)
    save_memory(cast, torch.device("cpu"), PRESETS["8"])
    return {key: value.to(torch.bfloat16) for key, value in cast.state_dict().items()}


@pytest.mark.slow
def test_gradients_are_those_without_savings() -> None:
    """Checkpointing changes nothing; fp8 only rounds the weights, with checkpointing too."""
    plain = gradients("24")
    assert torch.equal(plain, gradients("16")) and bool(plain.any())
    assert torch.equal(gradients("8"), gradients("8", rounded=True)) and not torch.equal(gradients("8"), plain)


@pytest.mark.slow
@pytest.mark.parametrize("vram", PRESETS)
def test_every_preset_runs(vram: str, tiny_sdxl: Tiny, picture: Path, tmp_path: Path) -> None:
    options = {**QUICK, "previews": int(vram == "8"), "base": str(tiny_sdxl.file), "vram": vram, "out": tmp_path / "r"}
    events = list(running.run(split_job(picture, subject="cat", style="ink", **options), device="cpu"))
    warnings = [event.warning for event in events if event.warning]
    assert warnings == (
        []
        if vram == "max"
        else [f"--vram {vram} on a processor: half precision takes less memory there, and more time"]
    )
    assert any(bool(one.up.any()) for one in read(tmp_path / "r" / "style.safetensors").modules.values())
    assert ('vram = "' in (tmp_path / "r" / "run.toml").read_text()) == (vram != "max")


@pytest.mark.slow
def test_a_run_goes_on_with_another_preset(
    tiny_sdxl: Tiny, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbraid.runs.pace.SAVE_EVERY", 0.0)
    options = {**QUICK, "base": str(tiny_sdxl.file), "out": tmp_path / "r"}
    begun: Any = running.run(split_job(picture, subject="cat", style="ink", **options), device="cpu")
    while next(begun).done < 2:
        pass
    next(begun)  # the last state is saved when the next step is requested
    begun.close()
    job = split_job(picture, subject="cat", style="ink", vram="12", **options)
    rest = list(running.run(job, resume=True, device="cpu"))
    assert any("moments start anew" in event.warning for event in rest)
    assert 1 <= len([event for event in rest if event.step]) < 4 and (tmp_path / "r" / "style.safetensors").exists()
    assert 'vram = "12"' in (tmp_path / "r" / "run.toml").read_text()


@pytest.mark.slow
def test_8_bit_moments_are_used_and_resumed(tiny_sdxl: Tiny, picture: Path) -> None:
    job = split_job(picture, subject="cat", style="ink", base=str(tiny_sdxl.file), vram="12", **QUICK)
    one, other = (
        prepare(job, prompts_of(job), opened_images(job), load(job.base, "cpu", job.loading)) for _ in range(2)
    )
    assert isinstance(one.state.optimizer, AdamW8)
    steps = train(one.run_data, one.recipe, one.state, 1)
    for _ in range(2):
        next(steps)
    other.state.restore(one.state.tensors())
    next(steps)
    next(train(other.run_data, other.recipe, other.state, 1))
    mine, theirs = one.state.tensors(), other.state.tensors()
    assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vram", "fix"), [("max", "Try --vram 24."), ("16", "Try --vram 12."), ("8", "Try a lower rank")]
)
def test_a_full_device_names_the_next_preset(
    vram: str, fix: str, tiny_sdxl: Tiny, picture: Path, tmp_path: Path
) -> None:
    """torch's own error is raised in the UNet's forward pass of the second step."""
    calls = 0

    def full(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += type(module).__name__ == "UNet2DConditionModel"
        if calls == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    options = {**QUICK, "base": str(tiny_sdxl.folder), "vram": vram, "out": tmp_path / "r"}
    hook = nn.modules.module.register_module_forward_pre_hook(full)
    try:
        with pytest.raises(UsageError, match="the device's memory is full") as error:
            list(running.run(split_job(picture, subject="cat", style="ink", **options), device="cpu"))
    finally:
        hook.remove()
    assert fix in error.value.fix and error.value.fix.endswith("Add --resume to go on with this run.")


@pytest.mark.slow
def test_text_encoders_are_gone_while_training(
    tiny_sdxl: Tiny, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref[nn.Module]] = []

    def loaded(*args: Any) -> Base:
        base = load(*args)
        encoders.extend(weakref.ref(base.pipe.components[name]) for name in ("text_encoder", "text_encoder_2"))
        return base

    monkeypatch.setattr(running, "load", loaded)
    options = {**QUICK, "base": str(tiny_sdxl.folder), "out": tmp_path / "r", "previews": 1}
    events = running.run(split_job(picture, subject="cat", style="ink", **options), device="cpu")
    next(events)
    gc.collect()
    assert len(encoders) == 2 and not any(one() for one in encoders)
    assert any(event.file for event in events), "pictures are drawn without them"


@pytest.mark.slow
def test_a_vae_that_overflows_is_told(tiny_sdxl: Tiny, picture: Path, tmp_path: Path) -> None:
    vae: Any = load(str(tiny_sdxl.folder), "cpu").vae
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e38)
    vae.save_pretrained(tmp_path / "vae")
    options = {**QUICK, "base": str(tiny_sdxl.folder), "vae": str(tmp_path / "vae"), "out": tmp_path / "r"}
    with pytest.raises(UsageError, match=r"NaN latents.*fp16-safe"):
        list(running.run(split_job(picture, subject="cat", style="ink", **options), device="cpu"))
    assert not (tmp_path / "r").exists()


def test_unknown_presets_are_refused(picture: Path) -> None:
    with pytest.raises(UsageError, match=r"no preset '10'.*There are: max, 24, 16, 12, 8"):
        load("icons", "cpu", Loading(vram="10"))
