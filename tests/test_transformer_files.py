"""Single files of the transformers: the layout of their authors, compared with diffusers' converters and with the same base as
a folder."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import original
import pytest
import tiny_transformers as tiny
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils as converters
from ldm import save_header, vae_state
from safetensors.torch import save_file
from test_every_base import loaded
from test_run import cli_in_process
from test_transformers import REAL
from tiny_bases import SIDE
from torch import Tensor

from unbraid.bases import base as bases
from unbraid.bases.configuration import denoiser_config
from unbraid.bases.families import FAMILIES
from unbraid.bases.original_names import parts
from unbraid.bases.presets import Loading
from unbraid.bases.recognised import family_preset
from unbraid.bases.transformer_config import transformer_config
from unbraid.bases.transformer_file import transformer_file
from unbraid.bench import grid
from unbraid.bench.registry import all_rows
from unbraid.bench.rows.training_cache import TrainingCache
from unbraid.bench.truth.tasks import QUICK
from unbraid.bench.truth.truths import Truth
from unbraid.common.errors import UsageError
from unbraid.files.lora_file import read
from unbraid.runs import run as running
from unbraid.runs.api import learn_job
from unbraid.runs.batch import recorded
from unbraid.sampling.render import Sampling, render

MAKERS: Mapping[str, Callable[[], Any]] = {
    "flux-dev": partial(tiny.flux, head=32),
    "flux-schnell": partial(tiny.flux, dev=False, head=32),
    "sd35-medium": tiny.sd35,
    "sd35-large": partial(tiny.sd35, medium=False),
    "z-image": tiny.z_image,
}
FAMILY = {"flux-dev": "flux", "flux-schnell": "flux", "sd35-medium": "sd3", "sd35-large": "sd3", "z-image": "z-image"}
CONVERTERS = {
    "flux": converters.convert_flux_transformer_checkpoint_to_diffusers,
    "sd3": converters.convert_sd3_transformer_checkpoint_to_diffusers,
    "z-image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
}


@pytest.fixture(scope="session", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(MAKERS[request.param](), tmp_path_factory.mktemp("files") / request.param)


def drawn(base: bases.Base) -> np.ndarray:
    return np.asarray(render(base, "a cat", sampling=Sampling(steps=2))[0]).astype(int)


@pytest.mark.slow
def test_a_file_with_the_parts_of_a_folder_draws_what_the_folder_draws(folder: Path, tmp_path: Path) -> None:
    base = bases.load(str(folder), "cpu")
    prefix = "model.diffusion_model." if folder.name in ("flux-dev", "sd35-medium") else ""
    file = original.save_transformer(base.pipe, tmp_path / "model.safetensors", prefix)
    with pytest.raises(UsageError, match="has no text encoders and no VAE") as error:
        bases.load(str(file), "cpu")
    assert "--parts" in str(error.value) and "\n" not in str(error.value)
    single = bases.load(str(file), "cpu", Loading(parts=str(folder)))
    ours, theirs = single.denoiser.state_dict(), base.denoiser.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (single.size, single.lora_metadata) == (base.size, base.lora_metadata)
    assert np.array_equal(drawn(single), drawn(base))


@pytest.mark.slow
def test_a_lora_of_a_file_is_one_of_the_stock_pipeline(folder: Path, picture: Path, tmp_path: Path) -> None:
    pipe = MAKERS[folder.name]()
    file = original.save_transformer(pipe, tmp_path / "model.safetensors")
    given: dict[str, Any] = {"base": str(file), "parts": str(folder), "out": tmp_path / "run", "rank": 2, "steps": 1}
    job = learn_job(picture, prompt="a sks cat", **given, previews=0)
    list(running.run(job, device="cpu"))
    lora = job.out / "lora.safetensors"
    found = read(lora)
    assert found.family == FAMILY[folder.name]
    with loaded(pipe, lora):
        layers = {f"transformer.{name}" for name, one in pipe.transformer.named_modules() if hasattr(one, "lora_A")}
    assert layers == found.modules.keys()
    assert recorded(job.out / "run.toml").loading.parts == str(folder)


def test_presets_and_configuration_of_a_file_are_those_of_its_family(folder: Path, tmp_path: Path) -> None:
    pipe = MAKERS[folder.name]()
    file = str(original.save_transformer(pipe, tmp_path / "model.safetensors"))
    assert family_preset(file, "unziplora") == family_preset(str(folder), "unziplora")
    family, config = denoiser_config(file)
    assert family.name == FAMILY[folder.name]
    stock = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    same = {key: _plain(config[key]) for key in stock.keys() & config.keys() - {"axes_lens", "sample_size"}}
    assert same == {key: _plain(stock[key]) or _plain(config[key]) for key in same}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", ["sd35-medium", "flux-dev", "z-image"])
@pytest.mark.slow
def test_complete_checkpoints(name: str, tmp_path: Path) -> None:
    """Text encoders and autoencoder come from the file. Of the folder, tokenizers and configurations are left."""
    pipe, folder = MAKERS[name](), tiny.save(MAKERS[name](), tmp_path / "folder")
    torch.manual_seed(5)  # other weights than those of the folder
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        model = getattr(pipe, part, None)
        if model is None or (part == "text_encoder" and name == "z-image"):
            continue
        for weight in model.parameters():
            weight.data.add_(0.02 * torch.randn_like(weight))
        if hasattr(model, "text_projection") and part == "text_encoder":  # SD3 reads CLIP-L's vector as it is
            torch.nn.init.eye_(model.text_projection.weight)
    file = original.save_complete(pipe, tmp_path / "all.safetensors", "vae." if name == "flux-dev" else VAE, SIDE)
    single = bases.load(str(file), "cpu", Loading(parts=str(folder)))
    for part, model in pipe.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        ours, theirs = single.pipe.components[part].state_dict(), model.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), part
    assert single.size == SIDE and single.vae.config["scaling_factor"] == pipe.vae.config["scaling_factor"]
    again = bases.load(str(tiny.save(pipe, tmp_path / "again")), "cpu")
    assert np.array_equal(drawn(single), drawn(again))


VAE = "first_stage_model."


@pytest.mark.slow
def test_sd35_with_both_clips_and_a_vae_needs_nothing_else(tmp_path: Path) -> None:
    pipe = tiny.sd35()
    torch.nn.init.eye_(pipe.text_encoder.text_projection.weight)
    file = original.save_complete(pipe, tmp_path / "all.safetensors", VAE, SIDE, leave_out="text_encoders.t5xxl")
    single = bases.load(str(file), "cpu")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    pipe.register_to_config(text_encoder_3=(None, None), tokenizer_3=(None, None))
    stock = bases.load(str(tiny.save(pipe, tmp_path / "folder")), "cpu")
    assert np.array_equal(drawn(single), drawn(stock))
    whole = original.save_complete(tiny.sd35(), tmp_path / "t5.safetensors", VAE, SIDE)
    with pytest.raises(UsageError, match="has no tokenizers"):
        bases.load(str(whole), "cpu")


def rows(value: Tensor) -> Tensor:
    """Which row each number is in, modulo a prime that no width is a multiple of, without memory of its own."""
    count = (torch.arange(len(value)) % 251).to(torch.uint8)
    return count.reshape(-1, *[1] * (value.ndim - 1)).expand(value.shape)


@pytest.mark.parametrize("name", ["flux", "sd3", "z-image"])
def test_diffusers_converters_find_the_same_weights(name: Any, tmp_path: Path) -> None:
    """Flux at its real width, with one block of each kind, because its converter knows no other."""
    if name == "flux":
        with torch.device("meta"):
            model: Any = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    else:
        model = (tiny.sd35() if name == "sd3" else tiny.z_image()).transformer
    state = original.STATES[type(model).__name__]({key: rows(value) for key, value in model.state_dict().items()})
    found = parts({key: tuple(value.shape) for key, value in state.items()}, name)
    theirs = CONVERTERS[name](checkpoint=dict(state))
    assert found.keys() == theirs.keys() == model.state_dict().keys()
    for key, value in theirs.items():
        ours = found[key].of(state[found[key].key][found[key].rows])
        assert ours.shape == value.shape == found[key].shape and torch.equal(ours, value), key


@pytest.mark.parametrize("name", REAL)
def test_files_of_the_real_size_give_the_published_configurations(name: str, tmp_path: Path) -> None:
    network = next(family.network for family in FAMILIES if family.name == name)
    model = network.empty(REAL[name])
    state = original.STATES[type(model).__name__](model.state_dict())
    found = transformer_file(save_header(state, tmp_path / "model.safetensors"))
    assert found and found.kind == name
    config = transformer_config(found)
    assert config.get("sample_size", 128) == 128
    for key, value in model.config.items():
        if key in config and value is not None:
            assert _plain(config[key]) == _plain(value), key


def changed(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    out = dict(state)
    if what == "lacks a weight":
        del out["single_blocks.1.linear2.weight"]
    elif what == "fill":
        out["img_in.weight"] = torch.zeros(64, 384)
    elif what == "more":
        out["siglip_embedder.0.weight"] = torch.zeros(4)
    elif what == "scaled":
        out["double_blocks.0.img_attn.qkv.scale_weight"] = torch.ones(1)
    elif what == "integers":
        out["img_in.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    return out


WRONG = {
    "lacks a weight": "single_transformer_blocks.1.proj_out.weight is not there",
    "fill": "takes 384 channels",
    "more": "siglip_embedder.0.weight is",
    "scaled": "quantised, such as double_blocks.0.img_attn.qkv.scale_weight",
    "integers": "quantised, such as img_in.weight",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_a_base_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    pipe = tiny.flux(head=32)
    folder = tiny.save(pipe, tmp_path / "folder")
    save_file(changed(original.transformer_state(pipe.transformer), what), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=re.escape(WRONG[what])) as error:
        bases.load(str(tmp_path / "model.safetensors"), "cpu", Loading(parts=str(folder)))
    assert "\n" not in str(error.value)


def test_parts_must_be_of_the_same_family(tmp_path: Path) -> None:
    file = original.save_transformer(tiny.sd35(), tmp_path / "model.safetensors")
    folder = tiny.save(tiny.flux(), tmp_path / "flux")
    for other, why in ((str(folder), "is a FluxPipeline, not SD3.5"), (str(tmp_path), "no model_index.json")):
        with pytest.raises(UsageError, match=why):
            bases.load(str(file), "cpu", Loading(parts=other))
    with pytest.raises(UsageError, match="there is no such folder"):
        bases.load(str(file), "cpu", Loading(parts=str(tmp_path / "gone.safetensors")))
    with pytest.raises(UsageError, match="goes with a single file"):
        bases.load("icons", "cpu", Loading(parts=str(folder)))


@pytest.mark.slow
def test_a_schnell_file_has_its_own_schedule_with_the_parts_of_dev(tmp_path: Path) -> None:
    folder = tiny.save(tiny.flux(head=32), tmp_path / "dev")
    schnell = tiny.flux(dev=False, head=32)
    file = original.save_transformer(schnell, tmp_path / "model.safetensors")
    base = bases.load(str(file), "cpu", Loading(parts=str(folder)))
    assert base.pipe.scheduler.config == {**schnell.scheduler.config}
    assert base.lora_metadata == {"modelspec.architecture": "flux-1-schnell/lora"}


@pytest.mark.slow
def test_another_vae_from_a_file(tmp_path: Path) -> None:
    pipe = tiny.flux(head=32)
    folder = tiny.save(pipe, tmp_path / "folder")
    file = original.save_transformer(pipe, tmp_path / "model.safetensors")
    for weight in pipe.vae.parameters():
        weight.data.mul_(1.5)
    save_file({key: value.contiguous() for key, value in vae_state(pipe.vae).items()}, tmp_path / "ae.safetensors")
    for base in (str(file), str(folder)):
        parts = str(folder) if base == str(file) else ""
        found = bases.load(base, "cpu", Loading(vae=str(tmp_path / "ae.safetensors"), parts=parts)).vae
        assert found.config["shift_factor"] == 0.1159 and found.config["scaling_factor"] == 0.3611
        assert torch.equal(
            found.state_dict()["decoder.conv_in.weight"], pipe.vae.state_dict()["decoder.conv_in.weight"]
        )


@pytest.mark.parametrize("verb", ["bench", "probe-blocks"])
def test_parts_of_the_commands_that_measure(verb: str, tmp_path: Path) -> None:
    """What is wrong with them is told before anything is drawn."""
    file = original.save_transformer(tiny.flux(head=32), tmp_path / "model.safetensors")
    base = {"bench": ["--work", str(tmp_path / "w"), "--base"], "probe-blocks": []}[verb]
    for name, given, what in (
        ("icons", str(tmp_path), "goes with a single file"),
        (str(file), "", "Add --parts"),
        (str(file), "no/where/at/all", "there is no such folder"),
        (str(file), str(tmp_path), "has no model_index.json of Flux.1"),
    ):
        code, text = cli_in_process([verb, *base, name, *(["--parts", given] if given else [])])
        assert code == 1 and what in text and len(text.strip().splitlines()) == 1, text


def test_the_benchmark_trains_and_draws_with_the_parts(picture: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tiny.save(tiny.flux(head=32), tmp_path / "folder")
    file = original.save_transformer(tiny.flux(head=32), tmp_path / "model.safetensors")
    (todo, *_) = grid.plan(tmp_path, QUICK, [next(iter(all_rows()))], str(file), str(folder))
    assert todo.parts == str(folder)
    cache = TrainingCache(tmp_path / "work", QUICK, todo.base, parts=todo.parts)
    assert type(cache.base.pipe).__name__ == "FluxPipeline"
    jobs: list[Any] = []
    monkeypatch.setattr(TrainingCache, "train", lambda self, job: jobs.append(job) or tmp_path)
    cache.learn(picture, "a cat", 3, rank=2)
    cache.split(Truth("cat", "ink", picture), seed=5)
    assert [(job.loading.parts, job.base) for job in jobs] == [(str(folder), str(file))] * 2
