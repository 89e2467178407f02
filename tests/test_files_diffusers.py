"""Complete pipelines: diffusers loads our SDXL and SD1.5 files, with text encoders, and they have the same effect there."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta
from unbraid.files.lora_file import read, write


def loras(pipe: StableDiffusionXLPipeline | StableDiffusionPipeline) -> dict[str, Lora]:
    """LoRAs on every linear layer of the UNet's attention and of the text encoders, with different ranks and alphas."""
    rng = torch.Generator().manual_seed(1)
    out: dict[str, Lora] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, module in model.named_modules() if model is not None else ():
            inside = ".attn" in name or ".self_attn." in name or ".mlp." in name
            if isinstance(module, nn.Linear) and inside:
                r, (d, k) = 2 + len(out) % 3, module.weight.shape
                path = name if component == "unet" or name.startswith("text_model.") else f"text_model.{name}"
                down, up = torch.randn(r, k, generator=rng) / k**0.5, torch.randn(d, r, generator=rng) / 8
                out[f"{component}.{path}"] = Lora(down, up, 1.0 + len(out) % 4)
    return out


def outputs(pipe: StableDiffusionXLPipeline | StableDiffusionPipeline) -> list[Tensor]:
    with torch.no_grad():
        found = pipe.encode_prompt(
            "dog", device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        texts = [tensor for tensor in found if tensor is not None]
        noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        added = {"text_embeds": texts[1], "time_ids": torch.ones(1, 6)} if len(texts) > 1 else None
        return [*texts, pipe.unet(noisy, 3, texts[0], added_cond_kwargs=added).sample]


def applied(pipe: StableDiffusionXLPipeline | StableDiffusionPipeline, modules: dict[str, Lora]) -> None:
    for name, one in modules.items():
        component, _, path = name.partition(".")
        model = getattr(pipe, component)
        there = dict(model.named_modules())
        weight = there[path if path in there else path.removeprefix("text_model.")].weight
        weight.data += delta(one).view_as(weight)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["v_base", "sd15_base"])
def test_pipelines_load_our_files(kind: str, dialect: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    kinds = {"v_base": (StableDiffusionXLPipeline, "sdxl"), "sd15_base": (StableDiffusionPipeline, "sd15")}
    cls, family = kinds[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (cls.from_pretrained(request.getfixturevalue(kind)) for _ in range(2))
    base = outputs(ours)
    write(tmp_path / "a.safetensors", loras(ours), family=family, dialect=dialect, dtype=torch.float32)  # type: ignore[arg-type]
    applied(ours, read(tmp_path / "a.safetensors").modules)
    theirs.load_lora_weights(tmp_path / "a.safetensors")
    for before, mine, other in zip(base, outputs(ours), outputs(theirs), strict=True):
        assert float((mine - before).abs().max()) > 1e-2
        assert float((mine - other).abs().max()) < 1e-5


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16, 16),
        "norm_num_groups": 4,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**config).eval()


def everywhere(unet: UNet2DConditionModel, conv: bool) -> dict[str, Lora]:
    """LoRAs with different ranks and alphas on every linear layer, and on convolutions if wanted."""
    rng = torch.Generator().manual_seed(1)
    out = {}
    for i, (name, module) in enumerate(unet.named_modules()):
        if isinstance(module, nn.Linear):
            r, (d, k) = 2 + i % 3, module.weight.shape
            out[f"unet.{name}"] = Lora(
                torch.randn(r, k, generator=rng) / k**0.5, torch.randn(d, r, generator=rng) / 4, 1.0 + i % 5
            )
        elif isinstance(module, nn.Conv2d) and conv:
            d, *tail = module.weight.shape
            out[f"unet.{name}"] = Lora(
                torch.randn(2, *tail, generator=rng) / 9, torch.randn(d, 2, 1, 1, generator=rng) / 4, 3.0
            )
    return out


def run(unet: UNet2DConditionModel) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    x, text, pooled, sizes = (torch.randn(*s, generator=rng) for s in ((1, 4, 8, 8), (1, 5, 24), (1, 16), (1, 6)))
    with torch.no_grad():
        return unet(x, 3, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample


@pytest.mark.slow
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


def test_diffusers_reads_fused_flux_files_as_we_do(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    double, single = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
    leaves = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.to_out.0", "norm1.linear", "ff.net.2")
    names = [f"{double}.{leaf}" for leaf in leaves] + [
        f"{single}.{leaf}" for leaf in (*leaves[:3], "proj_mlp", "proj_out")
    ]
    rows, columns = {"norm1.linear": 18432, "proj_mlp": 12288}, {"ff.net.2": 12288, "proj_out": 15360}
    modules = {}
    for name in names:
        leaf = name.split(".", 3)[-1]
        down = torch.randn(2, columns.get(leaf, 3072), generator=rng)
        modules[name] = Lora(down, torch.randn(rows.get(leaf, 3072), 2, generator=rng), 1.0)
    write(tmp_path / "a.safetensors", modules, family="flux", dialect="kohya", dtype=torch.float32)
    theirs: Any = FluxPipeline.lora_state_dict(str(tmp_path / "a.safetensors"))
    for name, one in modules.items():
        down, up = theirs[f"{name}.lora_A.weight"], theirs[f"{name}.lora_B.weight"]
        probe = torch.randn(down.shape[1], generator=rng)
        want = one.up @ (one.down @ probe) * (one.alpha / 2)
        assert float((up @ (down @ probe) - want).norm() / want.norm()) < 1e-5, name
