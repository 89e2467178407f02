"""LoRAs of transformers: no file command loses or renames a module, and diffusers loads as much after as before."""

import random
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from spelling import lora, same, save
from torch import nn

from unbraid.common.errors import UsageError
from unbraid.files.formats.families import DESIGNS
from unbraid.files.formats.recognise import recognise
from unbraid.files.lora_file import read
from unbraid.files.merge import Size
from unbraid.files.report import report
from unbraid.files.tools import Source, convert, edit, merge_files, resize

JOINT: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
FLUX = JOINT | {"num_layers": 2, "num_single_layers": 2, "in_channels": 8, "axes_dims_rope": (4, 4, 8)}
GUIDED = {"pooled_projection_dim": 20, "guidance_embeds": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("FluxTransformer2DModel", FLUX | GUIDED),
    "flux2": (
        "Flux2Transformer2DModel",
        FLUX | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        JOINT
        | {
            "num_layers": 2,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 20,
            "in_channels": 4,
            "sample_size": 8,
        }
        | {"dual_attention_layers": (0,)},
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        JOINT | {"num_layers": 2, "in_channels": 8, "axes_dims_rope": (4, 4, 8)},
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24}
        | {"in_channels": 4, "axes_dims": [4, 4, 8], "axes_lens": [64, 64, 64]},
    ),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        | {"caption_channels": [24, 28], "text_emb_dim": 20, "in_channels": 4, "axes_dims_rope": (4, 4, 8)}
        | {"num_routed_experts": 2, "num_activated_experts": 1, "patch_size": 2, "llama_layers": [0]},
    ),
    "wan": (
        "WanTransformer3DModel",
        {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "text_dim": 24, "in_channels": 4}
        | {"out_channels": 4, "ffn_dim": 40, "freq_dim": 16},
    ),
    "anima": (
        "CosmosTransformer3DModel",
        {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "text_embed_dim": 24, "in_channels": 4}
        | {"out_channels": 4, "adaln_lora_dim": 8, "mlp_ratio": 4},
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"num_layers": 2, "hidden_size": 32, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}
        | {"cap_feat_dim": 24, "in_channels": 4, "axes_dim_rope": (4, 4, 8), "axes_lens": (30, 30, 30)},
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "text_embed_dim": 24, "pooled_projection_dim": 20, "in_channels": 4}
        | {"out_channels": 4, "rope_axes_dim": (4, 4, 8)},
    ),
}
ORIGINAL = {  # names that trainers of these models write and that no tool converts
    "wan": ("diffusion_model.blocks.3.self_attn.q", "diffusion_model.blocks.3.ffn.0"),
    "hunyuan-video": ("diffusion_model.double_blocks.1.img_attn_qkv", "diffusion_model.single_blocks.0.linear1"),
    "anima": ("diffusion_model.blocks.3.self_attn.q_proj", "diffusion_model.blocks.3.adaln_modulation_mlp.1"),
    "krea2": ("diffusion_model.blocks.3.attn.wq", "diffusion_model.txtfusion.refiner_blocks.1.mlp.gate"),
    "lumina2": ("lora_unet_layers_3_attention_qkv", "lora_unet_layers_3_adaLN_modulation_1"),
    "unknown": ("some.thing.4.of_its_own", "some.other"),
}


def tiny(family: str) -> nn.Module:
    name, config = MODELS[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, name)(**config)


def linears(family: str) -> dict[str, tuple[int, int]]:
    found = tiny(family).named_modules()
    return {name: tuple(one.weight.shape) for name, one in found if isinstance(one, nn.Linear)}  # type: ignore[misc]


def loaded(family: str, path: Path) -> int:
    model: Any = tiny(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_lora_adapter(load_file(path), prefix="transformer")
    return sum(bool(module.weight.any()) for name, module in model.named_modules() if name.endswith("lora_B.default_0"))


@pytest.mark.parametrize("family", MODELS)
def test_every_linear_of_a_family_is_in_its_table(family: str) -> None:
    shapes = {f"transformer.{name}": ((2, k), (d, 2)) for name, (d, k) in linears(family).items()}
    assert recognise(shapes, {}).family == family


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_no_module_is_lost(family: str, seed: int, tmp_path: Path) -> None:
    rng, every = random.Random(seed), linears(family)
    names = rng.sample(sorted(every), rng.randrange(2, len(every) + 1))
    tensors = {}
    for i, name in enumerate(names):
        one = lora(i, *every[name], rank=rng.choice((2, 3)), dtype=torch.float32)
        tensors |= {f"transformer.{name}.lora_A.weight": one.down, f"transformer.{name}.lora_B.weight": one.up}
    given_metadata = {"modelspec.architecture": f"{DESIGNS[family].architecture}/lora"}  # type: ignore[index]
    source, out = save(tmp_path / "a.safetensors", tensors, given_metadata), tmp_path / "b.safetensors"
    before = loaded(family, source)
    merge_files([Source(source, 0.7), Source(source, 0.3)], out)
    assert set(load_file(out)) == set(tensors) and loaded(family, out) == before == len(names)
    assert same(read(source).modules, read(out).modules) < 1e-5
    resize(source, out, Size(rank=1))
    assert set(load_file(out)) == set(tensors) and loaded(family, out) == before
    try:
        convert(source, tmp_path / "k.safetensors", "kohya")
    except UsageError as error:
        assert "is not known" in str(error) or "no such module" in str(error)
        return
    convert(tmp_path / "k.safetensors", out, "diffusers")
    assert set(load_file(out)) == set(tensors) and loaded(family, out) == before
    assert same(read(source).modules, read(out).modules) < 1e-5


@pytest.mark.parametrize("family", ORIGINAL)
def test_names_without_a_table_stay_letter_for_letter(family: str, tmp_path: Path) -> None:
    names = ORIGINAL[family]
    kohya = names[0].startswith("lora_unet_")
    down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    tensors = {}
    for i, name in enumerate(names):
        one = lora(i, 63 if "linear1" in name else 27, 9, rank=2, dtype=torch.float32)
        tensors |= {f"{name}.{down}.weight": one.down, f"{name}.{up}.weight": one.up}
    source, out = save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    assert read(source).family == family and set(read(source).modules) == set(names)
    for work in (
        lambda: convert(source, out),
        lambda: edit(source, out, ["other|mlp|linear1|ffn|adaLN=0.5"] if family != "krea2" else (), 0.5),
        lambda: resize(source, out, Size(rank=1)),
        lambda: merge_files([Source(source), Source(source, -0.5)], out),
    ):
        work()
        assert {key for key in load_file(out) if not key.endswith(".alpha")} == set(tensors)
    assert report(source).family == family
    with pytest.raises(UsageError, match="not known"):
        convert(source, out, "diffusers" if kohya else "kohya")


def test_evidence_is_told_in_its_order() -> None:
    def seen(names: list[str], k: int = 32, rows: int = 1, **metadata: str) -> tuple[str, str]:
        found = recognise(dict.fromkeys(names, ((2, k), (rows * k, 2))), metadata)
        return found.family, found.by

    shared = ["transformer.transformer_blocks.0.attn.to_q"]
    assert seen(shared) == ("unknown", "nothing")
    assert seen(shared, 2432) == ("sd3", "shapes")
    assert seen(shared, ss_base_model_version="qwen-image") == ("qwen-image", "metadata")
    assert seen(shared, 2432, ss_base_model_version="qwen-image") == ("sd3", "shapes")
    assert seen(["diffusion_model.joint_blocks.0.x_block.attn.qkv"]) == ("sd3", "names")
    single = ["lora_unet_single_blocks_0_linear1"]
    assert seen(single, rows=9) == ("flux2", "shapes") and seen(single, rows=7) == ("flux", "likely")
    assert seen(single, rows=7, ss_base_model_version="chroma") == ("chroma", "metadata")
    assert seen(["transformer.transformer_blocks.40.img_mod.1"]) == ("qwen-image", "names")


def test_a_unet_and_a_transformer_do_not_mix(tmp_path: Path) -> None:
    one = lora(0, 8, 8, dtype=torch.float32)

    def file(name: str) -> Source:
        keys = {f"{name}.lora_A.weight": one.down, f"{name}.lora_B.weight": one.up}
        return Source(save(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors", keys))

    unet = file("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q")
    unknown = file("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    strange = file("unet.down_blocks.9.attentions.0.transformer_blocks.0.attn1.to_q")
    dit, other = file("transformer.transformer_blocks.0.attn.to_q"), file("diffusion_model.blocks.0.self_attn.q")
    assert merge_files([unet, unknown], tmp_path / "out.safetensors").family == "sdxl"
    for pair in ([unet, dit], [unknown, dit], [unet, strange], [dit, other], [unet, other]):
        with pytest.raises(UsageError):
            merge_files(pair, tmp_path / "out2.safetensors")
    assert not (tmp_path / "out2.safetensors").exists()


def test_fused_and_split_in_one_file_is_refused(tmp_path: Path) -> None:
    keys = {}
    for leaf, rows in (("qkv", 24), ("to_q", 8)):
        one = lora(0, rows, 8, dtype=torch.float32)
        stem = f"lora_unet_layers_0_attention_{leaf}"
        keys |= {f"{stem}.lora_down.weight": one.down, f"{stem}.lora_up.weight": one.up}
    with pytest.raises(UsageError, match=r"z-image.*fused and split"):
        read(save(tmp_path / "a.safetensors", keys))
