"""What a checkpoint's header shows (kind, prediction type, size), and the configurations derived from it at the real sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ldm import State, clip_state, open_clip_state, save_header, unet_state, vae_state
from tiny_bases import Tiny
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from unbraid.bases.clip_tokenizer import clip_tokenizer
from unbraid.bases.families.unet import UNet
from unbraid.bases.single_file import configs
from unbraid.bases.sniff import sniff
from unbraid.common.errors import UsageError
from unbraid.files.formats.header import read_header

SDXL = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD21 = {
    "sample_size": 96,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
STOCK: dict[str, dict[str, Any]] = {"sdxl": SDXL, "sd15": SD15, "sd21": SD21}  # as in the models' own config.json
PARAMETERS = {"sdxl": 2_567_463_684, "sd15": 859_520_964, "sd21": 865_910_724}  # of the published UNets
TEXT_PARAMETERS = {"sdxl": [123_060_480, 694_659_840], "sd15": [123_060_480], "sd21": [340_387_840]}
VAE_PARAMETERS = 83_653_863


def real_size(kind: str) -> State:
    """A complete checkpoint of the real size, without values."""
    with torch.device("meta"):
        state = unet_state(UNet2DConditionModel(**STOCK[kind]))
        state |= vae_state(stock_vae(), "first_stage_model.")
        if kind == "sdxl":
            state |= clip_state(CLIPTextModel(clip_l()), "conditioner.embedders.0.transformer.text_model.")
            second = CLIPTextModelWithProjection(open_clip(1280, 32))
            state |= open_clip_state(second, "conditioner.embedders.1.model.")
        elif kind == "sd15":
            state |= clip_state(CLIPTextModel(clip_l()), "cond_stage_model.transformer.text_model.")
        else:
            state |= open_clip_state(CLIPTextModel(open_clip(1024, 24)), "cond_stage_model.model.")
            state["cond_stage_model.model.text_projection"] = torch.empty(1024, 1024)
    return state


def stock_vae() -> AutoencoderKL:
    settings: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    settings |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**settings)


def clip_l() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )


def open_clip(width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )


@pytest.mark.parametrize("kind", STOCK)
def test_real_sizes_give_the_stock_configurations(kind: str, tmp_path: Path) -> None:
    checkpoint = sniff(save_header(real_size(kind), tmp_path / "model.safetensors"))
    assert checkpoint.kind == kind and checkpoint.prediction == ("v_prediction" if kind == "sd21" else "epsilon")
    found = configs(checkpoint)
    unet = found["unet/config.json"]
    assert {key: unet[key] for key in STOCK[kind]} == STOCK[kind]
    assert sum(p.numel() for p in UNet().empty(unet).parameters()) == PARAMETERS[kind]
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(found["vae/config.json"])
        texts = [found[name] for name in ("text_encoder/config.json", "text_encoder_2/config.json") if name in found]
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        models = [kind(CLIPTextConfig(**text)) for kind, text in zip(kinds, texts, strict=False)]
    assert sum(p.numel() for p in vae.parameters()) == VAE_PARAMETERS
    assert [sum(p.numel() for p in model.parameters()) for model in models] == TEXT_PARAMETERS[kind]
    assert vae.config["scaling_factor"] == (0.13025 if kind == "sdxl" else 0.18215)


@pytest.mark.parametrize(
    ("marks", "prediction", "zero_snr"),
    [
        ({}, "epsilon", False),
        ({"modelspec.prediction_type": "v"}, "v_prediction", False),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    ],
)
def test_modelspec_says_what_is_predicted(
    marks: dict[str, str], prediction: str, zero_snr: bool, tiny_sdxl: Tiny, tmp_path: Path
) -> None:
    shapes = {key: torch.empty(shape, device="meta") for key, shape in read_header(tiny_sdxl.file).shapes.items()}
    checkpoint = sniff(save_header(shapes, tmp_path / "m.safetensors", **marks))
    assert (checkpoint.prediction, checkpoint.zero_snr) == (prediction, zero_snr)
    assert checkpoint.side == 1024, "the resolution is not stated"
    marked = {**shapes, "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    checkpoint = sniff(save_header(marked, tmp_path / "v.safetensors"))
    assert (checkpoint.prediction, checkpoint.zero_snr) == ("v_prediction", True)


def test_sd21_predicts_v_unless_it_is_the_512_one(tiny_sd21: Tiny, tmp_path: Path) -> None:
    shapes = {key: torch.empty(shape, device="meta") for key, shape in read_header(tiny_sd21.file).shapes.items()}
    for marks, prediction, side in (
        ({}, "v_prediction", 768),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", 512),
        ({"modelspec.resolution": "640x896"}, "v_prediction", 768),
    ):
        found = sniff(save_header(shapes, tmp_path / "m.safetensors", **marks))
        assert (found.kind, found.prediction, found.side) == ("sd21", prediction, side)


def known(**keys: tuple[int, ...]) -> State:
    return {key.replace("__", "."): torch.empty(shape, device="meta") for key, shape in keys.items()}


def unet_like(channels: int, context: int) -> State:
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.empty(320, channels, 3, 3, device="meta"),
        "model.diffusion_model.out.2.weight": torch.empty(4, 320, 3, 3, device="meta"),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(64, context),
    }


OTHERS: dict[str, tuple[State, str]] = {
    "sd3": (known(model__diffusion_model__joint_blocks__0__x_block__attn__qkv__weight=(8, 8)), "an SD3 checkpoint"),
    "flux": (known(double_blocks__0__img_attn__qkv__weight=(8, 8)), "a Flux checkpoint"),
    "flux in a file": (
        known(model__diffusion_model__double_blocks__0__img_attn__norm__key_norm__scale=(8,)),
        "a Flux checkpoint",
    ),
    "controlnet": (known(control_model__time_embed__0__weight=(8, 8)), "a ControlNet"),
    "kohya lora": (known(lora_unet_input_blocks_4_1_proj_in__lora_down__weight=(4, 8)), "this is a LoRA"),
    "peft lora": (known(unet__down_blocks__1__attentions__0__proj_in__lora_A__weight=(4, 8)), "this is a LoRA"),
    "old lora": (known(unet__mid_block__attn1__processor__to_q_lora__down__weight=(4, 8)), "this is a LoRA"),
    "lokr": (known(lora_unet_mid__lokr_w1=(4, 8)), "this is a LoRA"),
    "embedding": (known(emb_params=(2, 768)), "a textual inversion"),
    "vae": (known(encoder__conv_in__weight=(8, 3, 3, 3), decoder__conv_in__weight=(8, 4, 3, 3)), "a VAE, which goes"),
    "part": (known(down_blocks__0__resnets__0__conv1__weight=(8, 8, 3, 3)), "one part of a diffusers model"),
    "unknown": (known(layers__0__weight=(8, 8)), "no checkpoint that is known: its first tensor is layers.0.weight"),
    "empty": ({}, "no checkpoint that is known"),
    "refiner": (unet_like(4, 1280), "an SDXL refiner"),
    "inpainting": (unet_like(9, 768), "an inpainting checkpoint: its UNet takes 9 channels"),
    "edited pictures": (unet_like(8, 768), "an image-conditioned checkpoint"),
    "unet alone": (unet_like(4, 768), "has not all of its text encoders"),
    "unclip": (
        unet_like(4, 1024) | {"model.diffusion_model.label_emb.0.0.weight": torch.empty(1280, 2048, device="meta")},
        "an unCLIP checkpoint",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_named(what: str, tmp_path: Path) -> None:
    state, message = OTHERS[what]
    with pytest.raises(UsageError, match=message) as error:
        sniff(save_header(state, tmp_path / "file.safetensors"))
    assert "\n" not in str(error.value) and error.value.fix


CLIPS_NUMBERS = {  # as OpenCLIP's tokenizer (open_clip_torch 3.3.0) gives them
    "a sks octopus in watercolour style": [320, 48136, 22327, 530, 18377, 1844],
    "Ünïcode 日本語 🦊 don't we're 12,345!": [
        *(
            6522,
            77,
            35689,
            3217,
            39121,
            44353,
            34002,
            508,
            6040,
            488,
            847,
            713,
            649,
            982,
            272,
            273,
            267,
            274,
            275,
            276,
            256,
        ),
    ],
    "": [],
    "a\tcat\n  (best:1.2)": [320, 2368, 263, 949, 281, 272, 269, 273, 264],
    "a " * 99: [320] * 75,
}


@pytest.mark.parametrize("text", CLIPS_NUMBERS, ids=range(len(CLIPS_NUMBERS)))
def test_clips_own_numbers(text: str) -> None:
    found = clip_tokenizer()(text, padding="max_length", truncation=True).input_ids
    expected = [49406, *CLIPS_NUMBERS[text], 49407]
    assert found[: len(expected)] == expected and set(found[len(expected) :]) <= {49407} and len(found) == 77


def test_openclip_fills_up_with_exclamation_marks() -> None:
    exclaiming = clip_tokenizer("!")("a", padding="max_length").input_ids
    assert exclaiming[:3] == [49406, 320, 49407] and set(exclaiming[3:]) == {0} and len(exclaiming) == 77
