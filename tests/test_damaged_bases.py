"""Damaged bases, as single files and as diffusers folders: each is told in one line that names the file."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import original
import pytest
import tiny_bases
import tiny_transformers as tiny
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from unbraid.bases import base as bases
from unbraid.bases.loadable import check_loading
from unbraid.bases.presets import Loading
from unbraid.common.errors import UsageError

TRANSFORMERS: Mapping[str, Callable[[], Any]] = {
    "flux": partial(tiny.flux, head=32),
    "sd35": tiny.sd35,
    "z-image": tiny.z_image,
}
QUICK, SLOW = "z-image", ("flux", "sd35", "sdxl", "sd15")
RAW = ("tuple", "torch.Size", "unpack", "https://")  # of messages that are not for users
State = dict[str, Tensor]


@pytest.fixture(scope="session", params=(QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny_bases.Tiny:
    out = tmp_path_factory.mktemp(request.param)
    if make := TRANSFORMERS.get(request.param):
        pipe = make()
        file = original.save_transformer(pipe, out / "file.safetensors")
        return tiny_bases.Tiny(tiny.save(pipe, out / "folder"), file)
    return tiny_bases.save_both(getattr(tiny_bases, request.param)(), out)


def refused(base: Path, where: str, what: str, loading: Loading = bases.AS_IT_IS, *, unloaded: bool = True) -> None:
    """The base is refused in one line that ends the path with `where`; with `unloaded` also before weights are read."""
    for opened in (check_loading, lambda name, how: bases.load(name, "cpu", how))[0 if unloaded else 1 :]:
        with pytest.raises(UsageError, match=what) as raised:
            opened(str(base), loading)
        text = str(raised.value)
        assert f"{where}: " in text and text.isprintable() and text.endswith("."), text
        assert not any(word in text for word in RAW), text


def cut(file: Path, to: Path) -> None:
    to.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def reshaped(state: State, key: str, how: str) -> State:
    if how == "lacks":
        return {name: value for name, value in state.items() if name != key}
    value = torch.cat([state[key], state[key]]) if how == "doubled" else state[key].reshape(-1).clone()
    return {**state, key: value}


def test_single_files(whole: tiny_bases.Tiny, tmp_path: Path) -> None:
    unet = (whole.folder / "unet").exists()
    loading = Loading() if unet else Loading(parts=str(whole.folder))
    file = tmp_path / "damaged.safetensors"
    cut(whole.file, file)
    refused(file, file.name, "not a readable safetensors file .*get it again", loading)
    state = {key: value.clone() for key, value in load_file(whole.file).items()}
    own = {key: value for key, value in state.items() if "model.diffusion_model" in key or not unet}
    kinds = {value.ndim: key for key, value in own.items()} | {5: next(iter(own))}
    for key in kinds.values():
        for how in ("lacks", "doubled", *(("flat",) if own[key].ndim > 1 else ())):
            save_file(reshaped(state, key, how), file)
            with pytest.raises(UsageError) as raised:
                check_loading(str(file), loading)
            text = str(raised.value)
            assert not any(word in text for word in RAW) and text.count(f"{file}: ") == 1, text
    for key in [key for key in state if key not in own and key.endswith(("layer_norm1.bias", "in_proj_weight"))][:2]:
        for how in ("lacks", "doubled", "flat"):
            save_file(reshaped(state, key, how), file)
            if how != "flat" or state[key].ndim > 1:
                refused(file, file.name, "lacks|cannot be loaded|is not there|not all|stock", loading, unloaded=False)


def test_folders(whole: tiny_bases.Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "base"
    network = "unet" if (whole.folder / "unet").exists() else "transformer"
    for part in (network, "vae", "text_encoder"):
        shutil.copytree(whole.folder, folder)
        (file,) = (folder / part).glob("*.safetensors")
        state = {key: value.clone() for key, value in load_file(file).items()}  # else it is read from the file
        cut(file, file)
        refused(folder, file.name, "not a readable safetensors file .*get it again")
        file.unlink()
        refused(folder, part, r"no weights in \.safetensors here")
        key = next(key for key in sorted(state) if state[key].ndim == 2 or key.endswith("conv_in.weight"))
        save_file(reshaped(state, key, "doubled"), file, {"format": "pt"})
        refused(folder, folder.name, "is .* not |other shapes", unloaded=False)
        save_file(reshaped(state, key, "lacks"), file, {"format": "pt"})
        refused(folder, part if part == "text_encoder" else folder.name, "lacks 1 weights", unloaded=False)
        shutil.rmtree(folder)
    assert "error" not in capfd.readouterr().err


def test_shards(whole: tiny_bases.Tiny, tmp_path: Path) -> None:
    network = "unet" if (whole.folder / "unet").exists() else "transformer"
    pipe, folder = DiffusionPipeline.from_pretrained(whole.folder), tmp_path / "base"
    shutil.copytree(whole.folder, folder)
    for part in (network, "text_encoder"):
        shutil.rmtree(folder / part)
        model = getattr(pipe, part)
        model.save_pretrained(folder / part, max_shard_size=sum(p.nbytes for p in model.parameters()) // 3)
    bases.load(str(folder), "cpu")
    for part in (network, "text_encoder"):
        shard = sorted((folder / part).glob("*.safetensors"))[1]
        data = shard.read_bytes()
        cut(shard, shard)
        refused(folder, shard.name, "not a readable safetensors file .*get it again")
        shard.unlink()
        refused(folder, shard.name, "this part of the weights is missing")
        shard.write_bytes(data)
        (index,) = (folder / part).glob("*.index.json")
        text = index.read_text()
        index.write_text(text[:40])
        refused(folder, index.name, "is no readable index of weights")
        index.write_text(text)
    bases.load(str(folder), "cpu")
