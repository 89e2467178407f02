"""The configurations of a diffusers pipeline, derived from the tensor shapes in a checkpoint's header.

What shapes do not show is taken from the stock models: head sizes, activations, the VAE's scaling factor, the noise
schedule.
"""

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any, Literal

from unbraid.bases.sniff import POSITIONS, TEXT, UNET, VAE, Checkpoint, Kind, Prediction
from unbraid.common.errors import UsageError
from unbraid.files.formats.blocks import to_ldm
from unbraid.files.formats.header import Shape

Config = dict[str, Any]
GROUPS = 32  # groups of every group norm in UNet and VAE
VaeKind = Kind | Literal["flux", "sd3", "z-image"]
SCALING: Mapping[VaeKind, float] = {
    "sdxl": 0.13025,
    "sd15": 0.18215,
    "sd21": 0.18215,
    "flux": 0.3611,
    "sd3": 1.5305,
    "z-image": 0.3611,
}
SHIFT: Mapping[VaeKind, float] = {"flux": 0.1159, "sd3": 0.0609, "z-image": 0.1159}
HEADS = 8  # attention heads at every level of SD1.5's UNet
HEAD = 64  # channels of an attention head in all other models


def unet_config(checkpoint: Checkpoint) -> Config:
    """The UNet's configuration. Every level has two residual blocks, as in all stock models; the rest follows from
    shapes. Raises UsageError if the UNet has no attention."""
    shapes, kind = checkpoint.shapes, checkpoint.kind
    names = takewhile(
        lambda name: name in shapes, (f"{UNET}input_blocks.{3 * i + 1}.0.out_layers.3.weight" for i in count())
    )
    channels = [shapes[name][0] for name in names]
    attention = [f"{UNET}input_blocks.{3 * i + 1}.1." for i in range(len(channels))]
    has = [f"{prefix}norm.weight" in shapes for prefix in attention]
    if not any(has):
        raise UsageError("no attention layers are found in its UNet", checkpoint.path, "Give a diffusers folder of it.")
    first = attention[has.index(True)]
    config = {
        "sample_size": checkpoint.side // vae_factor(checkpoint),
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in has],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(has)],
        "layers_per_block": 2,
        "transformer_layers_per_block": [_depth(shapes, prefix) for prefix in attention],
        "cross_attention_dim": shapes[f"{first}transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": HEADS if kind == "sd15" else [max(1, c // HEAD) for c in channels],
        "use_linear_projection": len(shapes[f"{first}proj_in.weight"]) == 2,
        "upcast_attention": kind == "sd21",
        "norm_num_groups": GROUPS,
    }
    return {"_class_name": "UNet2DConditionModel", **config, **(_added(shapes) if kind == "sdxl" else {})}


def _depth(shapes: Mapping[str, Shape], attention: str) -> int:
    return max(1, sum(f"{attention}transformer_blocks.{i}.norm1.weight" in shapes for i in range(64)))


def _added(shapes: Mapping[str, Shape]) -> Config:
    """SDXL's additional inputs: the pooled text embedding and six size numbers."""
    width = shapes[f"{UNET}label_emb.0.0.weight"][1]
    pooled = shapes[TEXT["sdxl"][1] + "text_projection"][1]
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled) // 6,
        "projection_class_embeddings_input_dim": width,
    }


def expected_names(name: str, kind: Kind) -> str:
    """The LDM name of one of the UNet's parameters, by its diffusers name."""
    module, _, leaf = name.rpartition(".")
    ldm = "out.0" if module == "conv_norm_out" else to_ldm(module, "sdxl" if kind == "sdxl" else "sd15")
    return f"{UNET}{ldm}.{leaf}"


def vae_config(shapes: Mapping[str, Shape], kind: VaeKind, prefix: str = VAE) -> Config:
    """The configuration of an autoencoder whose tensors have LDM names that begin with `prefix`."""
    levels = list(takewhile(lambda i: f"{prefix}encoder.down.{i}.block.0.conv2.weight" in shapes, count()))
    layers = list(takewhile(lambda j: f"{prefix}encoder.down.0.block.{j}.conv2.weight" in shapes, count()))
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [shapes[f"{prefix}encoder.down.{i}.block.0.conv2.weight"][0] for i in levels],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": len(layers),
        "latent_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
        "mid_block_add_attention": f"{prefix}encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": f"{prefix}quant_conv.weight" in shapes,
        "use_post_quant_conv": f"{prefix}post_quant_conv.weight" in shapes,
        "norm_num_groups": GROUPS,
        "scaling_factor": SCALING[kind],
        "shift_factor": SHIFT.get(kind),
        "force_upcast": kind not in ("sd15", "sd21"),
        "sample_size": 512 if kind in ("sd15", "sd21") else 1024,
    }


def vae_factor(checkpoint: Checkpoint) -> int:
    """The ratio of the sides of pictures and latents; 8 if the checkpoint has no VAE."""
    if not checkpoint.has_vae:
        return 8
    return 2 ** (len(vae_config(checkpoint.shapes, checkpoint.kind)["block_out_channels"]) - 1)


def text_configs(checkpoint: Checkpoint) -> list[Config]:
    """Configurations of the one or two text encoders. OpenAI's CLIP has the names of transformers; OpenCLIP has names of
    its own, and fused projections."""
    return [text_config(checkpoint.shapes, prefix, checkpoint.kind) for prefix in TEXT[checkpoint.kind]]


def text_config(shapes: Mapping[str, Shape], prefix: str, kind: Kind) -> Config:
    """The configuration of a CLIP whose keys begin with `prefix`."""
    open_clip = prefix.endswith(".model.")
    table = shapes[prefix + ("token_embedding.weight" if open_clip else "embeddings.token_embedding.weight")]
    layer = "transformer.resblocks.{}." if open_clip else "encoder.layers.{}."
    layers = sum(f"{prefix}{layer.format(i)}mlp.{'c_fc' if open_clip else 'fc1'}.weight" in shapes for i in range(64))
    wide = shapes[f"{prefix}{layer.format(0)}mlp.{'c_fc' if open_clip else 'fc1'}.weight"][0]
    projected = shapes.get(prefix + "text_projection", table)[1]
    with_projection = kind == "sdxl" and open_clip
    return {
        "architectures": ["CLIPTextModelWithProjection" if with_projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": table[0],
        "hidden_size": table[1],
        "intermediate_size": wide,
        "projection_dim": projected,
        # SD2.1 was trained on the last layer but one, so diffusers leaves the 24th layer out
        "num_hidden_layers": min(layers, 23) if kind == "sd21" else layers,
        "num_attention_heads": max(1, table[1] // HEAD),
        "max_position_embeddings": shapes[prefix + POSITIONS[open_clip]][0],
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,  # as in the stock configurations: with 2, transformers takes the pooled vector at the highest token id
    }


def scheduler_config(kind: Kind, prediction: Prediction, zero_snr: bool) -> Config:
    """Stable Diffusion's noise schedule, and the sampler: Euler for SDXL, as in its stock pipeline; DDIM for the others
    and for zero terminal SNR."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "timestep_spacing": "trailing" if zero_snr else "leading",
        "steps_offset": 0 if zero_snr else 1,
    }
    if kind == "sdxl" and not zero_snr:
        return {"_class_name": "EulerDiscreteScheduler", **config}
    more = {"clip_sample": False, "set_alpha_to_one": False, "rescale_betas_zero_snr": zero_snr}
    return {"_class_name": "DDIMScheduler", **config, **more}


def model_index(kind: Kind, scheduler: Config) -> Config:
    """The contents of model_index.json."""
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if kind == "sdxl":
        second = {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        return {"_class_name": "StableDiffusionXLPipeline", **parts, **second, "force_zeros_for_empty_prompt": True}
    more = {"safety_checker": [None, None], "requires_safety_checker": False}
    return {"_class_name": "StableDiffusionPipeline", **parts, **more}
