"""All dialects are read and two are written; files are the same after writing and reading, and have the same effect in
diffusers."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from spelling import ATTN, lora, same, save, some
from torch import nn

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta
from unbraid.files.formats.blocks import Family, block_of, from_ldm, to_ldm
from unbraid.files.formats.fused import fuse, split
from unbraid.files.formats.header import catalogue, read_header
from unbraid.files.formats.metadata import card, data_uri, write_sidecar
from unbraid.files.formats.names import canonical
from unbraid.files.formats.spelling import DIALECTS, Spelling, kohya, ldm, spelled
from unbraid.files.formats.unets import unet_modules
from unbraid.files.formats.widths import width
from unbraid.files.lora_file import LoraFile, read, write
from unbraid.files.tools import convert


def kohya_like(name: Callable[[str], str]) -> Spelling:
    return Spelling(name, ".lora_down.weight", ".lora_up.weight", alpha=True)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read(dialect: str, tmp_path: Path) -> None:
    modules = some()
    file = read(save(tmp_path / "a.safetensors", spelled(modules, DIALECTS[dialect])))
    assert same(modules, file.modules) < 1e-14


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_every_dialect_is_converted_exactly(dialect: str, to: str, tmp_path: Path) -> None:
    modules = some()
    source = save(tmp_path / "a.safetensors", spelled(modules, DIALECTS[dialect]))
    convert(source, tmp_path / "b.safetensors", to)  # type: ignore[arg-type]
    assert same(modules, read(tmp_path / "b.safetensors").modules) < 1e-14


def test_dense_ziplora_files_become_low_rank_again(tmp_path: Path) -> None:
    modules = {f"{ATTN}.to_q": lora(0, 40, 30, 4), f"{ATTN}.to_k": lora(1, 40, 30, 6)}
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        tensors = {f"{name}.lora.weight": delta(one).to(dtype) for name, one in modules.items()}
        file = read(save(tmp_path / "a.safetensors", tensors))
        assert {n: len(one.down) for n, one in file.modules.items()} == {f"{ATTN}.to_q": 4, f"{ATTN}.to_k": 6}
        assert same(modules, file.modules) < tolerance


def test_tucker_convolutions_are_folded(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(*s, generator=rng) for s in ((3, 5, 1, 1), (3, 3, 3, 3), (6, 3, 1, 1)))
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    parts = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    one = read(save(tmp_path / "a.safetensors", parts)).modules["unet.down_blocks.0.resnets.0.conv1"]
    picture = torch.randn(1, 5, 8, 8, generator=rng)
    conv = nn.functional.conv2d
    want = conv(conv(conv(picture, down), mid), up)
    assert torch.allclose(conv(conv(picture, one.down), one.up), want, atol=1e-4)


def test_alpha_of_peft_settings(tmp_path: Path) -> None:
    modules = {f"{ATTN}.to_q": lora(0), f"{ATTN}.to_k": lora(1)}
    settings_ = {"unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_k": 1.5}, "unet.rank_pattern": {}}
    tensors = spelled({n: Lora(o.down, o.up, 3.0) for n, o in modules.items()}, DIALECTS["diffusers, PEFT"])
    path = save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings_)})
    assert {n[-1]: one.alpha for n, one in read(path).modules.items()} == {"q": 6.0, "k": 1.5}
    path = save(path, tensors, {"lora_adapter_metadata": json.dumps(settings_ | {"unet.use_rslora": True})})
    assert read(path).modules[f"{ATTN}.to_q"].alpha == pytest.approx(6 * 3**0.5)


def test_several_adapters_must_be_chosen(tmp_path: Path) -> None:
    one = lora(0)
    keys = {
        f"{ATTN}.to_q.lora_{part}.{name}.weight": t
        for name in ("style", "content")
        for part, t in (("A", one.down), ("B", one.up))
    }
    path = save(tmp_path / "a.safetensors", {key: tensor.clone() for key, tensor in keys.items()})
    with pytest.raises(UsageError, match="several adapters"):
        read(path)
    assert same({f"{ATTN}.to_q": Lora(one.down, one.up, 3.0)}, read(path, "style").modules) == 0


def test_the_block_table_is_diffusers_own_unet() -> None:
    with torch.device("meta"):
        config: dict[str, Any] = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        }
        unet = UNet2DConditionModel(**config)
        small = UNet2DConditionModel(cross_attention_dim=768)
    table = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert table == unet_modules("sdxl") and len(table) == 794
    assert {n for n, m in small.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)} == unet_modules("sd15")
    ldm_names = {name: to_ldm(name) for name in table}
    assert len(set(ldm_names.values())) == 794
    for name, there in ldm_names.items():
        assert there is not None and from_ldm(there) == name
        assert (
            canonical("lora_unet_" + there.replace(".", "_"))
            == f"unet.{name}"
            == canonical("lora_unet_" + name.replace(".", "_"))
        )
    for name in unet_modules("sd15"):
        there = to_ldm(name, "sd15")
        assert there is not None and from_ldm(there) == name
    assert (
        block_of("unet.up_blocks.0.attentions.1.proj_in") == "OUT01"
        and block_of("unet.mid_block.resnets.1.conv1") == "MID"
    )


def test_written_kohya_files_have_what_the_tools_look_for(tmp_path: Path) -> None:
    given_metadata = card("Octopus", trigger="octopus in ink", tags="Style")
    modules = {n: Lora(torch.ones(len(o.down), width("sdxl", n) or 5), o.up, o.alpha) for n, o in some().items()}
    write(tmp_path / "a.safetensors", modules, family="sdxl", metadata=given_metadata)
    tensors = load_file(tmp_path / "a.safetensors")
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert len(alphas) == 1 and all(t.shape == () for key, t in tensors.items() if key.endswith(".alpha"))
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in tensors
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in tensors
    with safe_open(tmp_path / "a.safetensors", "np") as handle:
        metadata = handle.metadata()
    assert metadata["ss_network_dim"] == "Dynamic" and metadata["ss_base_model_version"].startswith("sdxl")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.trigger_phrase"] == "octopus in ink" and "lora_adapter_metadata" not in metadata
    side = json.loads(write_sidecar(tmp_path / "a.safetensors", metadata).read_text())
    assert side["activation text"] == "octopus in ink" and side["sd version"] == "SDXL"


def test_a_sidecar_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    lora, thumbnail = tmp_path / "a.safetensors", {"modelspec.thumbnail": data_uri(Image.new("RGB", (9, 9), "red"))}
    for name in ("a.json", "a.jpg"):
        (tmp_path / name).write_text("the old one")
        (tmp_path / f"{name}-held").hardlink_to(tmp_path / name)
    write_sidecar(lora, thumbnail)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.size == (9, 9)
    assert json.loads((tmp_path / "a.json").read_text())
    assert all((tmp_path / f"{name}-held").read_text() == "the old one" for name in ("a.json", "a.jpg"))
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(UsageError, match="its thumbnail is damaged"):
        write_sidecar(lora, {"modelspec.thumbnail": "data:image/jpeg;base64,no", "modelspec.description": "new"})
    assert (tmp_path / "a.json").read_bytes() == before
    (tmp_path / "b.json").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_sidecar(tmp_path / "b.safetensors", thumbnail)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "b.jpg").exists()


@given(st.integers(0, 10**6), st.sampled_from(["fp16", "bf16", "fp32"]), st.sampled_from(["sdxl", "sd15"]))
@settings(max_examples=25, deadline=None)
def test_there_and_back_is_lossless(
    tmp_path_factory: pytest.TempPathFactory, seed: int, name: str, family: str
) -> None:
    folder = tmp_path_factory.mktemp("x")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
    rng = torch.Generator().manual_seed(seed)
    alphas = (torch.rand(4, generator=rng) * 8).tolist()
    modules = {n: Lora(o.down, o.up, a) for (n, o), a in zip(some(dtype).items(), alphas, strict=True)}
    write(folder / "a.safetensors", modules, family=family, dtype=None)  # type: ignore[arg-type]
    convert(folder / "a.safetensors", folder / "b.safetensors", "diffusers")
    convert(folder / "b.safetensors", folder / "c.safetensors", "kohya")
    assert same(modules, read(folder / "c.safetensors").modules) < 3e-7


def test_plain_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    modules = {n: Lora(o.down, o.up, 2.0 * len(o.down)) for n, o in some(torch.float16).items()}
    modules = {n: o for n, o in modules.items() if len(o.down) == 2}
    write(tmp_path / "a.safetensors", modules, family="sdxl")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    for name, one in read(tmp_path / "c.safetensors").modules.items():
        assert torch.equal(one.down, modules[name].down) and torch.equal(delta(one), delta(modules[name]))


def test_fp16_range_is_balanced(tmp_path: Path) -> None:
    one = lora(0)
    wild = {f"{ATTN}.to_q": Lora(one.down * 2e5, one.up * 1e-7, 3.0)}
    write(tmp_path / "a.safetensors", wild, family="sdxl")
    back = read(tmp_path / "a.safetensors")
    assert back.modules[f"{ATTN}.to_q"].down.dtype == torch.float16
    assert same(wild, back.modules) < 1e-3


class TestFlux:
    def modules(self, family: str, shared: bool) -> dict[str, Lora]:
        block = "transformer.transformer_blocks.1"
        names = [f"{block}.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0")]
        out = {
            name: lora(0 if shared and "to_out" not in name and "add" not in name else i, 5, 5, 2)
            for i, name in enumerate(names)
        }
        if family == "flux":
            out["transformer.single_transformer_blocks.3.proj_mlp"] = lora(9, 20, 5, 2)
            out["transformer.single_transformer_blocks.3.attn.to_k"] = lora(8, 5, 5, 2)
        return out

    @pytest.mark.parametrize("family", ["flux", "sd3"])
    @pytest.mark.parametrize("shared", [False, True])
    def test_fused_and_back(self, family: Family, shared: bool, tmp_path: Path) -> None:
        modules = self.modules(family, shared)
        fused = fuse(modules, family)
        again = {name: one for module, lora_ in fused.items() for name, one in split(module, lora_, family).items()}
        assert same(modules, again) < 1e-14
        assert all(len(again[name].down) == len(modules[name].down) for name in modules)  # the ranks do not grow
        for dialect in ("kohya", "diffusers"):
            write(tmp_path / "a.safetensors", modules, family=family, dialect=dialect, dtype=None)
            back = read(tmp_path / "a.safetensors")
            assert back.family == family and same(modules, back.modules) < 1e-14
            keys = list(load_file(tmp_path / "a.safetensors"))
            block = "double" if family == "flux" else "joint"
            assert any(key.startswith(f"lora_unet_{block}_blocks_1_") for key in keys) == (dialect == "kohya")

    def test_xlabs_names(self, tmp_path: Path) -> None:
        one = lora(0, 15, 5, 2, 2.0)
        keys = {
            "double_blocks.0.processor.qkv_lora2.down.weight": one.down,
            "double_blocks.0.processor.qkv_lora2.up.weight": one.up,
        }
        file = read(save(tmp_path / "a.safetensors", keys))
        assert file.family == "flux" and set(file.modules) == {
            f"transformer.transformer_blocks.0.attn.add_{leaf}_proj" for leaf in "qkv"
        }


def test_mixed_names_are_read_and_written_in_one(tmp_path: Path) -> None:
    modules = some()
    mixed = spelled(modules, kohya_like(lambda m: (ldm if "to_q" in m else kohya)(m)))
    convert(save(tmp_path / "a.safetensors", mixed), tmp_path / "b.safetensors")
    assert same(modules, read(tmp_path / "b.safetensors").modules) < 1e-14
    assert not any("down_blocks" in key for key in load_file(tmp_path / "b.safetensors"))


def test_a_family_is_recognised(tmp_path: Path) -> None:
    def family(module: str, k: int, metadata: dict[str, str] | None = None, name: Callable[[str], str] = kohya) -> str:
        tensors = spelled({module: lora(0, 4, k)}, kohya_like(name))
        return read(save(tmp_path / "a.safetensors", tensors, metadata)).family

    deep = f"unet.mid_block.attentions.0.transformer_blocks.{{}}.attn2.to_{{}}"  # noqa: F541
    assert family(deep.format(0, "k"), 2048) == "sdxl"
    assert family(deep.format(0, "k"), 768, {"ss_base_model_version": "sdxl_base_v1-0"}) == "sd15"
    assert family(deep.format(0, "q"), 64) == "unknown"
    assert family(deep.format(0, "q"), 64, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}) == "sdxl"
    assert family(deep.format(0, "q"), 64, None, ldm) == "sdxl"
    assert family(deep.format(7, "q"), 64) == "sdxl"


def test_reading_keeps_the_metadata(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", some(), family="sd15", metadata={"note": "hello"})
    file = read(tmp_path / "a.safetensors")
    assert isinstance(file, LoraFile) and file.metadata["note"] == "hello" and file.family == "sd15"
    assert not catalogue(read_header(tmp_path / "a.safetensors")).unknown


def test_the_header_has_the_hash_of_the_tensors(tmp_path: Path) -> None:
    """Computed as in webui's additional networks: over everything after the header."""
    write(tmp_path / "a.safetensors", some(torch.float32), family="sdxl")
    raw, metadata = (tmp_path / "a.safetensors").read_bytes(), read(tmp_path / "a.safetensors").metadata
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    assert metadata["sshs_model_hash"] == digest and metadata["modelspec.hash_sha256"] == f"0x{digest}"
