"""Every dialect in, two out: read, write, read again; and diffusers loads what we write to the same effect."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unbraid.blocks import block_of, from_ldm, to_ldm
from unbraid.errors import UsageError
from unbraid.file_tools import convert
from unbraid.files import LoraFile, read, write
from unbraid.fused import fuse, split
from unbraid.header import catalogue, read_header
from unbraid.loaders import unet_modules
from unbraid.lora import Lora
from unbraid.lowrank import delta
from unbraid.metadata import card, write_sidecar
from unbraid.names import canonical

ATTN = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_encoder.text_model.encoder.layers.0"


def lora(seed: int, d: int = 6, k: int = 5, rank: int = 3, alpha: float = 2.0, dtype: torch.dtype = torch.float64) -> Lora:
    rng = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, k, generator=rng, dtype=torch.float64).to(dtype)
    return Lora(down, torch.randn(d, rank, generator=rng, dtype=torch.float64).to(dtype), alpha)


def some(dtype: torch.dtype = torch.float64) -> dict[str, Lora]:
    names = (f"{ATTN}.to_q", f"{ATTN}.to_out.0", "unet.mid_block.attentions.0.proj_in", f"{TEXT}.self_attn.q_proj")
    return {name: lora(i, rank=2 + i % 3, alpha=1.0 + i, dtype=dtype) for i, name in enumerate(names)}


def same(first: dict[str, Lora], second: dict[str, Lora]) -> float:
    """The largest difference of the changes, relative to the change."""
    assert set(first) == set(second)
    return max(
        float((delta(first[n]).double() - delta(second[n]).double()).norm() / delta(first[n]).double().norm()) for n in first
    )


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def spelled(modules: dict[str, Lora], name: Callable[[str], str], down: str, up: str, alpha: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for module, one in modules.items():
        scale = 1.0 if alpha else one.alpha / len(one.down)
        out |= {f"{name(module)}{down}": one.down, f"{name(module)}{up}": one.up * scale}
        if alpha:
            out[f"{name(module)}.alpha"] = torch.tensor(one.alpha)
    return out


def kohya(module: str) -> str:
    component, _, path = module.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te1_"}[component] + path.replace(".", "_")


def ldm(module: str) -> str:
    component, _, path = module.partition(".")
    path = (to_ldm(path) or "") if component == "unet" else path
    return {"unet": "lora_unet_", "text_encoder": "lora_te1_"}[component] + path.replace(".", "_")


def processor(module: str) -> str:
    stem, _, leaf = module.removesuffix(".0").rpartition(".")
    return f"{stem}.processor.{leaf}" if "attn1" in module else module


DIALECTS: dict[str, tuple[Callable[[str], str], str, str, bool]] = {
    "kohya ldm": (ldm, ".lora_down.weight", ".lora_up.weight", True),
    "kohya diffusers": (kohya, ".lora_down.weight", ".lora_up.weight", True),
    "no alpha": (kohya, ".lora_down.weight", ".lora_up.weight", False),
    "peft": (str, ".lora_A.weight", ".lora_B.weight", False),
    "named adapter": (str, ".lora_A.default.weight", ".lora_B.default.weight", False),
    "base_model": (lambda m: f"base_model.model.{m}", ".lora_A.weight", ".lora_B.weight", False),
    "lora.down, B-LoRA": (str, ".lora.down.weight", ".lora.up.weight", False),
    "unet.unet., UnZipLoRA and Break-for-Make": (lambda m: m.replace("unet.", "unet.unet."), ".lora.down.weight", ".lora.up.weight", False),
    "linear layer": (str, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", False),
    "attention processors": (processor, "_lora.down.weight", "_lora.up.weight", False),
    "bare processors": (lambda m: processor(m).removeprefix("unet."), "_lora.down.weight", "_lora.up.weight", False),
    "no text_model": (lambda m: m.replace("text_model.", ""), ".lora_A.weight", ".lora_B.weight", False),
    "lycoris": (lambda m: kohya(m).replace("lora_unet_", "lycoris_"), ".lora_down.weight", ".lora_up.weight", True),
    "diffusion_model": (
        lambda m: m if m.startswith("text") else f"diffusion_model.{to_ldm(m.removeprefix('unet.'))}",
        ".lora_A.weight",
        ".lora_B.weight",
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read(dialect: str, tmp_path: Path) -> None:
    modules = some()
    file = read(save(tmp_path / "a.safetensors", spelled(modules, *DIALECTS[dialect])))
    assert same(modules, file.modules) < 1e-14


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_every_dialect_is_converted_exactly(dialect: str, to: str, tmp_path: Path) -> None:
    modules = {name: one for name, one in some().items()}
    source = save(tmp_path / "a.safetensors", spelled(modules, *DIALECTS[dialect]))
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
    tensors = spelled({n: Lora(o.down, o.up, 3.0) for n, o in modules.items()}, str, ".lora_A.weight", ".lora_B.weight", False)
    path = save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings_)})
    assert {n[-1]: one.alpha for n, one in read(path).modules.items()} == {"q": 6.0, "k": 1.5}
    settings_["unet.use_rslora"] = True
    path = save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings_)})
    assert read(path).modules[f"{ATTN}.to_q"].alpha == pytest.approx(6 * 3**0.5)


def test_several_adapters_must_be_chosen(tmp_path: Path) -> None:
    one = lora(0)
    keys = {f"{ATTN}.to_q.lora_{part}.{name}.weight": t for name in ("style", "content") for part, t in (("A", one.down), ("B", one.up))}
    path = save(tmp_path / "a.safetensors", {key: tensor.clone() for key, tensor in keys.items()})
    with pytest.raises(UsageError, match="style, content|content, style"):
        read(path)
    assert same({f"{ATTN}.to_q": Lora(one.down, one.up, 3.0)}, read(path, "style").modules) == 0


def test_the_block_table_is_diffusers_own_unet() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
        small = UNet2DConditionModel(cross_attention_dim=768)
    table = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert table == unet_modules("sdxl") and len(table) == 794
    assert {n for n, m in small.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)} == unet_modules("sd15")
    ldm_names = {name: to_ldm(name) for name in table}
    assert len(set(ldm_names.values())) == 794
    for name, there in ldm_names.items():
        assert there is not None and from_ldm(there) == name
        assert canonical("lora_unet_" + there.replace(".", "_")) == f"unet.{name}" == canonical("lora_unet_" + name.replace(".", "_"))
    for name in unet_modules("sd15"):
        there = to_ldm(name, "sd15")
        assert there is not None and from_ldm(there) == name
    assert block_of("unet.up_blocks.0.attentions.1.proj_in") == "OUT01" and block_of("unet.mid_block.resnets.1.conv1") == "MID"


def test_written_kohya_files_have_what_the_tools_look_for(tmp_path: Path) -> None:
    told = card("Octopus", trigger="octopus in ink", tags="Style")
    write(tmp_path / "a.safetensors", some(), family="sdxl", metadata=told)
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


@given(st.integers(0, 10**6), st.sampled_from(["fp16", "bf16", "fp32"]), st.sampled_from(["sdxl", "sd15"]))
@settings(max_examples=25, deadline=None)
def test_there_and_back_is_lossless(tmp_path_factory: pytest.TempPathFactory, seed: int, name: str, family: str) -> None:
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
    FAMILY = ("flux", "sd3")

    def modules(self, family: str, shared: bool) -> dict[str, Lora]:
        block = "transformer.transformer_blocks.1"
        names = [f"{block}.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0")]
        out = {name: lora(0 if shared and "to_out" not in name and "add" not in name else i, 5, 5, 2) for i, name in enumerate(names)}
        if family == "flux":
            out["transformer.single_transformer_blocks.3.proj_mlp"] = lora(9, 20, 5, 2)
            out["transformer.single_transformer_blocks.3.attn.to_k"] = lora(8, 5, 5, 2)
        return out

    @pytest.mark.parametrize("family", FAMILY)
    @pytest.mark.parametrize("shared", [False, True])
    def test_fused_and_back(self, family: str, shared: bool, tmp_path: Path) -> None:
        modules = self.modules(family, shared)
        fused = fuse(modules, family)
        again = {name: one for module, lora_ in fused.items() for name, one in split(module, lora_).items()}
        assert same(modules, again) < 1e-14
        assert all(len(again[name].down) == len(modules[name].down) for name in modules)  # no rank is gained
        for dialect in ("kohya", "diffusers"):
            write(tmp_path / "a.safetensors", modules, family=family, dialect=dialect, dtype=None)  # type: ignore[arg-type]
            back = read(tmp_path / "a.safetensors")
            assert back.family == family and same(modules, back.modules) < 1e-14
            keys = list(load_file(tmp_path / "a.safetensors"))
            block = "double" if family == "flux" else "joint"
            assert any(key.startswith(f"lora_unet_{block}_blocks_1_") for key in keys) == (dialect == "kohya")

    def test_xlabs_names(self, tmp_path: Path) -> None:
        one = lora(0, 15, 5, 2, 2.0)
        keys = {"double_blocks.0.processor.qkv_lora2.down.weight": one.down, "double_blocks.0.processor.qkv_lora2.up.weight": one.up}
        file = read(save(tmp_path / "a.safetensors", keys))
        assert file.family == "flux" and set(file.modules) == {
            f"transformer.transformer_blocks.0.attn.add_{leaf}_proj" for leaf in "qkv"
        }


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
    ).eval()


def everywhere(unet: UNet2DConditionModel, conv: bool) -> dict[str, Lora]:
    """Mixed ranks and alphas on every linear layer, and on the convolutions if wanted."""
    rng = torch.Generator().manual_seed(1)
    out = {}
    for i, (name, module) in enumerate(unet.named_modules()):
        if isinstance(module, nn.Linear):
            r, (d, k) = 2 + i % 3, module.weight.shape
            out[f"unet.{name}"] = Lora(torch.randn(r, k, generator=rng) / k**0.5, torch.randn(d, r, generator=rng) / 4, 1.0 + i % 5)
        elif isinstance(module, nn.Conv2d) and conv:
            d, *tail = module.weight.shape
            out[f"unet.{name}"] = Lora(torch.randn(2, *tail, generator=rng) / 9, torch.randn(d, 2, 1, 1, generator=rng) / 4, 3.0)
    return out


def run(unet: UNet2DConditionModel) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    x, text, pooled, sizes = (torch.randn(*s, generator=rng) for s in ((1, 4, 8, 8), (1, 5, 24), (1, 16), (1, 6)))
    with torch.no_grad():
        return unet(x, 3, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("conv", [False, True])
def test_diffusers_loads_what_we_write(dialect: str, conv: bool, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    modules = everywhere(unet, conv)
    write(tmp_path / "a.safetensors", modules, family="sdxl", dialect=dialect, dtype=torch.float32)  # type: ignore[arg-type]
    want = copy.deepcopy(unet)
    for name, one in read(tmp_path / "a.safetensors").modules.items():
        weight = want.get_submodule(name.removeprefix("unet.")).weight
        assert isinstance(weight, Tensor)
        weight.data += delta(one).view_as(weight)
    theirs = copy.deepcopy(unet)
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"))
    StableDiffusionXLPipeline(unet=theirs, **parts).load_lora_weights(tmp_path / "a.safetensors")  # type: ignore[arg-type]
    expected, base = run(want), run(unet)
    assert float((expected - base).abs().max()) > 0.1
    assert float((run(theirs) - expected).abs().max()) < 1e-5


BAD: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(os.urandom(999)),
    "pickle inside": lambda p: torch.save({"a": torch.ones(2)}, p),
    "unknown keys": lambda p: save(p, {"lora_unet_what_is_this.lora_up.weight": torch.ones(2, 2)}),
    "a checkpoint": lambda p: save(p, {"model.diffusion_model.out.2.weight": torch.ones(2, 2)}),
    "NaN": lambda p: save(p, spelled({f"{ATTN}.to_q": Lora(torch.full((1, 2), torch.nan), torch.ones(2, 1), 1.0)}, *DIALECTS["peft"])),
    "half a pair": lambda p: save(p, {f"{ATTN}.to_q.lora_A.weight": torch.ones(2, 2)}),
    "shapes": lambda p: save(p, {f"{ATTN}.to_q.lora_A.weight": torch.ones(2, 2), f"{ATTN}.to_q.lora_B.weight": torch.ones(2, 3)}),
    "integers": lambda p: save(p, {f"{ATTN}.to_q.lora_A.weight": torch.ones(2, 2, dtype=torch.int8), f"{ATTN}.to_q.lora_B.weight": torch.ones(2, 2)}),
    "LoHa": lambda p: save(p, {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)}),
    "LoKr": lambda p: save(p, {"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": torch.ones(2, 2)}),
    "DoRA": lambda p: save(p, {f"{ATTN}.to_q.lora_magnitude_vector.weight": torch.ones(2)}),
    "twice": lambda p: save(p, {f"{n}.lora_up.weight": torch.ones(2, 2) for n in ("lora_unet_middle_block_1_proj_in", "lora_unet_mid_block_attentions_0_proj_in")}),
    "a folder": lambda p: p.mkdir(),
    "a broken link": lambda p: p.symlink_to("nowhere"),
    "settings": lambda p: save(p, spelled({f"{ATTN}.to_q": lora(0)}, *DIALECTS["peft"]), {"lora_adapter_metadata": "{"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_give_one_clear_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    BAD[kind](path)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth"])
def test_pickles_are_refused_unopened(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="any code"):
        read(tmp_path / f"a{suffix}")


def test_mixed_names_are_read_and_written_in_one(tmp_path: Path) -> None:
    modules = some()
    mixed = spelled(modules, lambda m: (ldm if "to_q" in m else kohya)(m), ".lora_down.weight", ".lora_up.weight", True)
    convert(save(tmp_path / "a.safetensors", mixed), tmp_path / "b.safetensors")
    assert same(modules, read(tmp_path / "b.safetensors").modules) < 1e-14
    assert not any("down_blocks" in key for key in load_file(tmp_path / "b.safetensors"))


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"old")
    for bad in (OSError(28, "No space left on device"), PermissionError("no")):

        def fail(*_: object, error: OSError = bad) -> None:
            raise error

        monkeypatch.setattr("unbraid.files.save_file", fail)
        with pytest.raises(UsageError, match="cannot be written"):
            write(tmp_path / "a.safetensors", some(), family="sdxl")
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    with pytest.raises(UsageError, match="no modules"):
        write(tmp_path / "a.safetensors", {}, family="sdxl")
    with pytest.raises(UsageError, match="safetensors"):
        write(tmp_path / "a.bin", some(), family="sdxl")


def test_a_family_is_recognised(tmp_path: Path) -> None:
    def family(module: str, k: int, metadata: dict[str, str] | None = None, name: Callable[[str], str] = kohya) -> str:
        tensors = spelled({module: lora(0, 4, k)}, name, ".lora_down.weight", ".lora_up.weight", True)
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
