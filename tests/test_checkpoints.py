"""bake and extract on tiny checkpoints of every kind, compared with dense arithmetic, diffusers' own loading, and each other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TO_Q, family, layers, random_lora
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_bases import Tiny
from torch import Tensor, nn
from typer.testing import CliRunner

from unbraid.bases.single_file import load_single_file
from unbraid.cli.checkpoints import app
from unbraid.common.errors import UsageError
from unbraid.core.lowrank import delta
from unbraid.files.bake import bake
from unbraid.files.checkpoint_file import opened_checkpoint
from unbraid.files.extract import extract
from unbraid.files.lora_file import read, write
from unbraid.files.merge import Size
from unbraid.files.tools import Source

KINDS = ("tiny_sdxl", "tiny_v", "tiny_sd15", "tiny_sd21")


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.getfixturevalue(request.param)


def pipeline(path: Path) -> Any:
    return load_single_file(path, torch.float32, None)


def weights(pipe: Any) -> dict[str, Tensor]:
    """Module, named as in LoRA files → weight. Works with every version of transformers."""
    out = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, module in model.named_modules() if model is not None else ():
            if isinstance(module, nn.Linear | nn.Conv2d):
                short = name.removeprefix("text_model.")
                out[
                    f"{component}.{'text_model.' if component != 'unet' and short != 'text_projection' else ''}{short}"
                ] = module.weight.detach()
    return out


def test_all_layers_are_found_and_are_diffusers_own(tiny: Tiny) -> None:
    names, there = layers(tiny), weights(pipeline(tiny.file))
    there.pop("text_encoder_2.text_projection", None)
    assert set(names) >= set(there) and len(names) - len(there) in (0, 6), "SD2.1's last text layer is not diffusers'"
    with opened_checkpoint(tiny.file) as file:
        for name, weight in there.items():
            assert torch.equal(file.module_weight(name), weight), name


@pytest.mark.slow
def test_a_baked_checkpoint_is_the_base_with_the_lora(tiny: Tiny, tmp_path: Path) -> None:
    """On every layer, as diffusers loads the checkpoint, and nothing else changes."""
    loras = [random_lora(layers(tiny), seed=i) for i in range(2)]
    for i, lora in enumerate(loras):
        write(tmp_path / f"{i}.safetensors", lora, family=family(tiny), dtype=torch.float32)
    sources = [Source(tmp_path / "0.safetensors", 0.7), Source(tmp_path / "1.safetensors", -0.4)]
    done = bake(tiny.file, sources, tmp_path / "out.safetensors")
    before, after = weights(pipeline(tiny.file)), weights(pipeline(tmp_path / "out.safetensors"))
    before.pop("text_encoder_2.text_projection", None)
    for name, weight in before.items():
        change = 0.7 * delta(loras[0][name]) - 0.4 * delta(loras[1][name])
        assert torch.allclose(after[name], weight + change.reshape(weight.shape), atol=1e-6), name
    old, new = load_file(tiny.file), load_file(tmp_path / "out.safetensors")
    assert set(old) == set(new)
    assert sum(not torch.equal(old[key], new[key]) for key in old) == done.changed
    assert done.modules == 2 * len(loras[0]) and not any(
        "first_stage" in k and not torch.equal(old[k], new[k]) for k in old
    )


def test_header_order_and_untouched_bytes_stay(tiny_sdxl: Tiny, tmp_path: Path) -> None:
    write(tmp_path / "l.safetensors", {TO_Q: random_lora(layers(tiny_sdxl))[TO_Q]}, family="sdxl")
    base = tmp_path / "base.safetensors"
    old = {key: value.half() for key, value in load_file(tiny_sdxl.file).items()}
    save_file(old, base, {"modelspec.title": "Ä", "modelspec.hash_sha256": "0x1"})
    bake(base, [Source(tmp_path / "l.safetensors", 2.0)], tmp_path / "out.safetensors")
    heads = []
    for path in (base, tmp_path / "out.safetensors"):
        with path.open("rb") as file:
            heads.append(json.loads(file.read(int.from_bytes(file.read(8), "little"))))
    metadata = heads[1].pop("__metadata__")
    assert metadata["modelspec.title"] == "Ä" and "modelspec.hash_sha256" not in metadata
    assert json.loads(metadata["unbraid.baked"]) == [{"name": "l", "weight": 2.0, "blocks": []}]
    assert heads[0].pop("__metadata__") and heads[0] == heads[1]
    new = load_file(tmp_path / "out.safetensors")
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    assert [name for name in old if not torch.equal(old[name], new[name])] == [key]
    want = old[key].double() + 2 * delta(read(tmp_path / "l.safetensors").modules[TO_Q]).double()
    assert bool(((new[key].double() - want).abs() <= want.abs() * 2**-11 * 1.001 + 1e-7).all()), "rounded once"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_every_dtype_is_kept(dtype: torch.dtype, tiny_sdxl: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(tiny_sdxl.file).items()}, base)
    write(tmp_path / "l.safetensors", {TO_Q: random_lora(layers(tiny_sdxl))[TO_Q]}, family="sdxl")
    bake(base, [Source(tmp_path / "l.safetensors")], tmp_path / "out.safetensors")
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    old, new = load_file(base)[key], load_file(tmp_path / "out.safetensors")[key]
    change = delta(read(tmp_path / "l.safetensors").modules[TO_Q])
    want = old.to(torch.float64) + change.double()
    assert new.dtype == dtype
    half_a_step = max(torch.finfo(dtype).eps / 2, 2**-24)
    assert bool(
        ((new.double() - want).abs() <= want.abs() * half_a_step * 1.001 + torch.finfo(dtype).tiny + 1e-7).all()
    )


def test_dora_norms_and_biases_are_baked(tiny_sdxl: Tiny, tmp_path: Path) -> None:
    """All kinds at once; the change of a DoRA depends on the checkpoint's weights only, whatever else is baked."""
    old = load_file(tiny_sdxl.file)
    stem = "model.diffusion_model.input_blocks.4.1."
    weight, lora = (
        old[f"{stem}proj_in.weight"],
        random_lora(layers(tiny_sdxl))[TO_Q.replace("transformer_blocks.0.attn1.to_q", "proj_in")],
    )
    rng = torch.Generator().manual_seed(5)
    d, magnitude, vectors = (
        len(weight),
        torch.rand(len(weight), 1, generator=rng) + 0.5,
        torch.randn(4, 64, generator=rng),
    )
    key, text = "lora_unet_input_blocks_4_1_proj_in", "lora_te2_text_model_encoder_layers_1_self_attn_k_proj"
    parts = {
        f"{key}.lora_down.weight": lora.down,
        f"{key}.lora_up.weight": lora.up,
        f"{key}.dora_scale": magnitude,
        f"{key}.diff_b": vectors[0],
        "lora_unet_input_blocks_4_1_norm.w_norm": vectors[1],
        "lora_unet_input_blocks_4_1_norm.b_norm": vectors[2],
        f"{text}.diff_b": vectors[3],
    }
    assert d == 64
    save_file(parts, tmp_path / "l.safetensors")
    path = tmp_path / "l.safetensors"
    bake(tiny_sdxl.file, [Source(path, 0.5), Source(path, 0.25)], tmp_path / "out.safetensors")
    new = load_file(tmp_path / "out.safetensors")
    moved = weight.double() + lora.up.double() @ lora.down.double()
    want = weight.double() + 0.75 * (magnitude * moved / moved.norm(dim=1, keepdim=True) - weight.double())
    assert torch.allclose(new[f"{stem}proj_in.weight"].double(), want, atol=1e-6)
    for name, vector in zip((f"{stem}proj_in.bias", f"{stem}norm.weight", f"{stem}norm.bias"), vectors, strict=False):
        assert torch.allclose(new[name], old[name] + 0.75 * vector, atol=1e-6)
    fused = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"
    change = torch.cat([torch.zeros(64), 0.75 * vectors[3], torch.zeros(64)])
    assert torch.allclose(new[fused], old[fused] + change, atol=1e-6)
    assert sum(not torch.equal(old[name], new[name]) for name in old) == 5


def test_a_diffusers_unet_file_is_baked(tiny_sdxl: Tiny, tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in layers(tiny_sdxl).items() if name.startswith("unet.")}
    lora = random_lora(shapes)
    write(tmp_path / "l.safetensors", lora, family="sdxl", dtype=torch.float32)
    shutil.copytree(tiny_sdxl.folder / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    old = load_file(file)
    bake(file, [Source(tmp_path / "l.safetensors")], tmp_path / "out.safetensors")
    shutil.move(tmp_path / "out.safetensors", file)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            want = old[f"{name}.weight"] + delta(lora[f"unet.{name}"]).reshape(module.weight.shape)
            assert torch.allclose(module.weight.detach(), want, atol=1e-6), name


@pytest.mark.slow
def test_extract_gives_a_baked_lora_back(tiny: Tiny, tmp_path: Path) -> None:
    """With an error of at most 1e-3, on a checkpoint in fp32, where the change is not lost in rounding."""
    lora = random_lora(layers(tiny))
    write(tmp_path / "l.safetensors", lora, family=family(tiny), dtype=torch.float32)
    bake(tiny.file, [Source(tmp_path / "l.safetensors", 0.8)], tmp_path / "tuned.safetensors")
    for size in (Size(rank=2), Size(energy=0.9999999), Size(rank=8)):
        done = extract(tiny.file, tmp_path / "tuned.safetensors", tmp_path / "x.safetensors", size)
        found = read(tmp_path / "x.safetensors")
        assert set(found.modules) == set(lora) and not done.left and found.family == family(tiny)
        for name, one in found.modules.items():
            want = 0.8 * delta(lora[name])
            assert float((delta(one) - want).norm() / want.norm()) < 1e-3, name
            assert one.down.shape[1:] == lora[name].down.shape[1:]
        assert done.error < 1e-3 and done.worst[0] < 1e-3
    assert done.modules == len(lora)


def test_extract_tells_its_true_error_and_what_is_left(tiny_sdxl: Tiny, tmp_path: Path) -> None:
    old = load_file(tiny_sdxl.file)
    rng = torch.Generator().manual_seed(0)
    stem = "model.diffusion_model.input_blocks.4.1."
    touched = (
        f"{stem}proj_in.weight",
        f"{stem}proj_in.bias",
        f"{stem}norm.weight",
        "first_stage_model.quant_conv.weight",
    )
    new = old | {key: old[key] + torch.randn(old[key].shape, generator=rng) * 0.1 for key in touched}
    save_file(new, tmp_path / "tuned.safetensors")
    done = extract(
        tiny_sdxl.file, tmp_path / "tuned.safetensors", tmp_path / "x.safetensors", Size(rank=5), dtype=torch.float32
    )
    change = (new[touched[0]] - old[touched[0]]).double()
    s = torch.linalg.svdvals(change)
    assert done.modules == 1 and done.error == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-3)
    assert set(done.left) == set(touched[1:])
    with_energy = extract(tiny_sdxl.file, tmp_path / "tuned.safetensors", tmp_path / "y.safetensors", Size(energy=0.9))
    want = int(((s.square().cumsum(0) / s.square().sum()) < 0.9).sum()) + 1
    assert with_energy.ranks == (want, want) and with_energy.error <= 0.1**0.5 + 1e-3


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, UsageError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands(tiny_sdxl: Tiny, tmp_path: Path) -> None:
    write(tmp_path / "l.safetensors", random_lora(layers(tiny_sdxl)), family="sdxl")
    tuned, again = tmp_path / "tuned.safetensors", tmp_path / "again.safetensors"
    printed = call("bake", tiny_sdxl.file, f"{tmp_path / 'l.safetensors'}:0.5", "--out", tuned, "--quiet")
    assert "tensors changed, by" in printed
    printed = call("extract", tiny_sdxl.file, tuned, "--rank", 2, "--out", again, "--quiet")
    assert "rank 2, off by 0.0" in printed and "warning" not in printed
    with safe_open(again, "np") as handle:
        assert json.loads(handle.metadata()["unbraid.extracted"])["tuned"] == "tuned.safetensors"
