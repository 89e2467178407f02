"""Bases of all kinds: folders and single files of SDXL, SD1.5, SD2.1, with other VAEs; and files that are no bases."""

import pickle
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ldm import vae_state
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_bases import SIDE, Tiny, diffusion, save_both, sd15, sdxl

from unbraid.bases.base import Base, load
from unbraid.bases.presets import Loading
from unbraid.cli.main import main
from unbraid.common.errors import UsageError
from unbraid.core.train import train
from unbraid.files.lora_file import read
from unbraid.runs import run as running
from unbraid.runs.api import learn_job
from unbraid.runs.job import opened_images, prompts_of
from unbraid.runs.prepare import prepare
from unbraid.sampling.render import Sampling, render

KINDS = ("tiny_sdxl", "tiny_v", "tiny_sd15", "tiny_sd21")


def drawn(base: Base) -> np.ndarray:
    return np.asarray(render(base, "a cat in ink style", sampling=Sampling(negative="dark", steps=3))[0]).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_the_folder_it_was_made_from(kind: str, request: pytest.FixtureRequest) -> None:
    tiny: Tiny = request.getfixturevalue(kind)
    folder, file = load(str(tiny.folder), "cpu"), load(str(tiny.file), "cpu")
    assert (
        (folder.family, folder.size, folder.step)
        == (file.family, file.size, file.step)
        == (folder.family, SIDE, folder.step)
    )
    for part in ("unet", "vae", "text_encoder", *(("text_encoder_2",) if folder.family.name == "sdxl" else ())):
        one, other = (getattr(base.pipe, part).state_dict() for base in (folder, file))
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items()), part
    for key in (
        "prediction_type",
        "rescale_betas_zero_snr",
        "timestep_spacing",
        "beta_start",
        "beta_end",
        "beta_schedule",
    ):
        assert folder.pipe.scheduler.config.get(key) == file.pipe.scheduler.config.get(key), key
    assert diffusion(folder).scheduler.config["prediction_type"] == (
        "epsilon" if kind in ("tiny_sdxl", "tiny_sd15") else "v_prediction"
    )
    one, other = (drawn(base).astype(int) for base in (folder, file))
    assert np.abs(one - other).max() <= 1 and other.std() > 5, (
        "but for rounding: where weights lie in memory decides how they are added up"
    )


@pytest.mark.slow
def test_prediction_can_be_said(tiny_sdxl: Tiny) -> None:
    for where in (tiny_sdxl.folder, tiny_sdxl.file):
        base = load(str(where), "cpu", Loading(prediction="v"))
        assert (
            diffusion(base).scheduler.config["prediction_type"]
            == base.pipe.scheduler.config["prediction_type"]
            == "v_prediction"
        )
    with pytest.raises(UsageError, match="no prediction type 'eps'"):
        load(str(tiny_sdxl.file), "cpu", Loading(prediction="eps"))


@pytest.mark.slow
def test_another_vae(tiny_sdxl: Tiny, tiny_sd15: Tiny, tmp_path: Path) -> None:
    """Its own folder, a complete model's folder, a file with LDM names and a checkpoint all give the same VAE."""
    other = load(str(tiny_sd15.folder), "cpu")
    file = tmp_path / "vae.safetensors"
    save_file({key: value.contiguous() for key, value in vae_state(other.vae).items()}, file)
    bases = (tiny_sdxl.folder, tiny_sdxl.file) * 2
    for where, vae in zip(bases, (tiny_sd15.folder / "vae", tiny_sd15.folder, file, tiny_sd15.file), strict=True):
        base = load(str(where), "cpu", Loading(vae=str(vae)))
        assert all(torch.equal(value, base.vae.state_dict()[key]) for key, value in other.vae.state_dict().items())
        assert base.vae.config["scaling_factor"] == (0.13025 if vae.is_file() else 0.18215)
        assert base.vae.dtype == torch.float32


@pytest.mark.slow
def test_a_checkpoint_without_vae_wants_one(tiny_sdxl: Tiny, tmp_path: Path) -> None:
    state = {k: v for k, v in load_file(tiny_sdxl.file).items() if not k.startswith("first_stage_model.")}
    save_file(state, tmp_path / "pruned.safetensors", {"modelspec.resolution": f"{SIDE}x{SIDE}"})
    with pytest.raises(UsageError, match=r"the checkpoint has no VAE\. Add --vae"):
        load(str(tmp_path / "pruned.safetensors"), "cpu")
    base = load(str(tmp_path / "pruned.safetensors"), "cpu", Loading(vae=str(tiny_sdxl.folder / "vae")))
    assert base.size == SIDE and np.array_equal(drawn(base), drawn(load(str(tiny_sdxl.file), "cpu")))


def spoiled(what: str, tiny: Tiny, out: Path) -> Path:
    """A file that is no complete checkpoint."""
    path, data = out / "bad.safetensors", tiny.file.read_bytes()
    if what == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif what == "no bytes":
        path.write_bytes(b"")
    elif what == "garbage":
        path.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not JSON, though" * 9)
    elif what == "renamed pickle":
        path.write_bytes(pickle.dumps({"state_dict": {}}))
    elif what == "renamed torch file":
        torch.save({"state_dict": {}}, path)
    elif what == "pickle":
        path = out / "model.ckpt"
        torch.save({"state_dict": {}}, path)
    else:
        state = load_file(tiny.file)
        if what == "a UNet weight is gone":
            del state["model.diffusion_model.middle_block.0.in_layers.2.weight"]
        elif what == "a UNet weight is another's":
            state["model.diffusion_model.input_blocks.4.1.proj_in.weight"] = torch.zeros(64, 32)
        elif what == "a text weight is gone":
            del state["conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc2.weight"]
        elif what == "a VAE weight is gone":
            del state["first_stage_model.decoder.mid.block_1.conv1.weight"]
        elif what == "few tokens":
            key = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
            state[key] = state[key][:100].clone()
        save_file(state, path, {"modelspec.resolution": "64x64"})
    return path


SPOILED = {
    "truncated": "not a readable safetensors file .* The download may be incomplete",
    "no bytes": "not a readable safetensors file",
    "garbage": "not a readable safetensors file",
    "renamed pickle": "It is a pickle under another name",
    "renamed torch file": "It is a pickle under another name",
    "pickle": "pickle files are not read",
    "a UNet weight is gone": r"middle_block.0.in_layers.2.weight is not there",
    "a UNet weight is another's": r"proj_in.weight is \(64, 32\), not \(64, 64\)",
    "a text weight is gone": "it lacks 1 weights of its text_encoder, such as .*fc2.weight",
    "a VAE weight is gone": "weights are missing",
    "few tokens": "knows 100 tokens, CLIP has 49408",
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_no_whole_checkpoint_is_one_line(what: str, tiny_sdxl: Tiny, tmp_path: Path) -> None:
    path = spoiled(what, tiny_sdxl, tmp_path)
    with pytest.raises(UsageError, match=SPOILED[what]) as error:
        load(str(path), "cpu")
    assert "\n" not in str(error.value) and str(path) in str(error.value) and error.value.fix


def test_folders_that_are_no_text_to_image_model(tiny_sd15: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        load(str(tmp_path), "cpu")
    with pytest.raises(UsageError, match="no such base model"):
        load("models/gone.safetensors", "cpu")
    with pytest.raises(UsageError, match="no such VAE"):
        load(str(tiny_sd15.folder), "cpu", Loading(vae="gone.safetensors"))
    with pytest.raises(UsageError, match="no VAE in this file"):
        load(
            str(tiny_sd15.folder),
            "cpu",
            Loading(vae=str(tiny_sd15.folder / "unet" / "diffusion_pytorch_model.safetensors")),
        )
    with pytest.raises(UsageError, match="the VAE cannot be loaded"):
        load(str(tiny_sd15.folder), "cpu", Loading(vae=str(tmp_path)))


@pytest.mark.slow
def test_inpainting_bases_are_refused(tmp_path: Path) -> None:
    """A UNet with nine input channels, as a folder and as a file."""
    pipe: Any = sd15()
    pipe.unet.conv_in = torch.nn.Conv2d(9, 32, 3, padding=1)
    pipe.unet.register_to_config(in_channels=9)
    both = save_both(pipe, tmp_path)
    for where in (both.folder, both.file):
        with pytest.raises(UsageError, match="its UNet takes 9 channels"):
            load(str(where), "cpu")


@pytest.mark.slow
def test_aspect_is_kept_in_steps_of_64_and_the_size_is_told(tmp_path: Path) -> None:
    """For a base of 512 px or more, the UNet gets the original size, the position of the crop, and the final size."""
    pipe: Any = sdxl()
    pipe.unet.register_to_config(sample_size=64)
    pipe.save_pretrained(tmp_path / "base")
    Image.new("RGB", (700, 500), "red").save(tmp_path / "wide.png")
    job = learn_job(tmp_path / "wide.png", prompt="a cat", base=str(tmp_path / "base"), rank=2, steps=1)
    ready = prepare(job, prompts_of(job), opened_images(job), load(job.base, "cpu", job.loading))
    assert (ready.base.size, ready.base.step) == (512, 64)
    received: list[Any] = []
    ready.base.denoiser.register_forward_pre_hook(
        lambda m, args, given: received.append((args, given)), with_kwargs=True
    )
    next(train(ready.run_data, ready.recipe, ready.state, 1))
    ((noisy, _), given) = received[0]
    assert noisy.shape == (1, 4, 448 // 8, 576 // 8)
    assert given["added_cond_kwargs"]["time_ids"].tolist() == [[500, 700, 0, 25, 448, 576]]


@pytest.mark.slow
def test_small_bases_take_what_they_can(tiny_sdxl: Tiny, tiny_sd15: Tiny) -> None:
    assert (load(str(tiny_sdxl.file), "cpu").step, load(str(tiny_sd15.file), "cpu").step) == (32, 64)


@pytest.mark.slow
def test_the_command_line_takes_files_and_says_what_they_need(
    tiny_v: Tiny, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that does not state its prediction type, another VAE, and a small card: run.toml records all of it."""
    state = {key: value for key, value in load_file(tiny_v.file).items() if key not in ("v_pred", "ztsnr")}
    unlabelled = str(tmp_path / "silent.safetensors")
    save_file(state, unlabelled, {"modelspec.resolution": "64x64"})
    words = [
        "split",
        str(picture),
        "--subject",
        "cat",
        "--style",
        "ink",
        "--out",
        str(tmp_path / "r"),
        "--previews",
        "0",
    ]
    words += ["--base", unlabelled, "--prediction", "v", "--vae", str(tiny_v.folder / "vae")]
    words += ["--vram", "16", *(f"--set={one}" for one in ("rank=2", "steps=2", "window=1", "sample_times=1"))]
    assert called(*words) == 0
    printed = capsys.readouterr().err
    assert (
        "memory, estimated: " in printed
        and "with --vram 16" in printed
        and "half precision takes less memory" in printed
    )
    record = tomllib.loads((tmp_path / "r" / "run.toml").read_text())
    assert (record["prediction"], record["vram"], record["vae"]) == ("v", "16", str(tiny_v.folder / "vae"))
    drawn = ["generate", "--prompt", "a cat", "--steps", "2", "--out", str(tmp_path / "x.png"), "--base", unlabelled]
    assert called(*drawn, "--prediction", "v", "--vae", str(tiny_v.folder)) == 0 and (tmp_path / "x.png").exists()
    capsys.readouterr()
    assert called(*drawn[:-1], str(tmp_path / "r" / "style.safetensors")) == 1
    printed = capsys.readouterr().err
    assert len(printed.strip().splitlines()) == 1 and "this is a LoRA, not a base model" in printed


def called(*words: str) -> int:
    """Run the command line in this process."""
    argv, sys.argv = sys.argv, ["unbraid", *words]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = argv
    return stop.value.code if isinstance(stop.value.code, int) else int(stop.value.code is not None)


@pytest.mark.slow
def test_loras_say_that_they_are_for_sd21(tiny_sd21: Tiny, picture: Path, tmp_path: Path) -> None:
    job = learn_job(picture, prompt="a cat", base=str(tiny_sd21.file), rank=2, steps=1, previews=0, out=tmp_path / "r")
    list(running.run(job, device="cpu"))
    received = load(str(tiny_sd21.file), "cpu").lora_metadata
    assert received["ss_v2"] == "True" and received["ss_base_model_version"] == "sd_v2_v"
    assert received["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    written = read(tmp_path / "r" / "lora.safetensors").metadata
    assert written["ss_v2"] == "True" and written["ss_base_model_version"].endswith("-other"), "it is not SD2.1's size"
