"""Tiny random bases of the diffusion transformers, with the parts and the names of the real ones."""

import string
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_bases import SIDE, text
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from unbraid.bases.clip_tokenizer import END, _letters, clip_tokenizer

WIDTH = 32  # of T5's embeddings


def vae(scaling: float, shift: float) -> AutoencoderKL:
    """The layout of Flux's autoencoder: 16 channels, a shift, no quantising convolutions."""
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "latent_channels": 16,
        "sample_size": SIDE,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**settings)


def t5(width: int = WIDTH) -> tuple[T5EncoderModel, Any]:
    """T5 and a tokenizer that knows letters."""
    letters = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((one, -3.0) for one in string.ascii_letters),
    ]
    tokenizer = T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=512)
    size = {"d_model": width, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": len(letters)}
    return T5EncoderModel(T5Config(**size, feed_forward_proj="gated-gelu")), tokenizer  # type: ignore[arg-type]


def flux(dev: bool = True, head: int = 16) -> FluxPipeline:
    """Flux.1-dev with its guidance embedding and dynamic shift, or schnell. `head`: channels of a head; with 32, the rotary
    embedding divides them as in the real one."""
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=head,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=32,
        guidance_embeds=dev,
        axes_dims_rope=(4, (head - 4) // 2, (head - 4) // 2),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=vae(0.3611, 0.1159),
        text_encoder=CLIPTextModel(text(32, "quick_gelu")),
        tokenizer=clip_tokenizer(END),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def sd35(medium: bool = True) -> StableDiffusion3Pipeline:
    """SD3.5: medium has a second attention in its first block."""
    torch.manual_seed(0)
    encoder, tokenizer = t5(96)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        caption_projection_dim=32,
        pooled_projection_dim=96,
        pos_embed_max_size=16,
        dual_attention_layers=(0,) if medium else (),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(1.5305, 0.0609),
        text_encoder=CLIPTextModelWithProjection(text(32, "quick_gelu")),
        tokenizer=clip_tokenizer(END),
        text_encoder_2=CLIPTextModelWithProjection(text(64, "gelu")),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=encoder,
        tokenizer_3=tokenizer,
    )


TEMPLATE = "{% for m in messages %}u{{ m['content'] }}e{% endfor %}{% if add_generation_prompt %}a{% endif %}"


def z_image() -> ZImagePipeline:
    """Z-Image with a Qwen3 whose tokens are bytes."""
    torch.manual_seed(0)
    letters = {letter: i for i, letter in enumerate([*_letters(), "<|endoftext|>"])}
    tokenizer: Any = Qwen2Tokenizer(vocab=letters, merges=[], model_max_length=512)
    tokenizer.chat_template = TEMPLATE
    size = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Qwen3Config(**size, num_key_value_heads=2, head_dim=16, vocab_size=len(letters))  # type: ignore[arg-type]
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(0.3611, 0.1159),
        text_encoder=Qwen3Model(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def save(pipe: Any, out: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(out)
    return out
