"""diffusers' transformers in the layout of their authors, as ComfyUI's files have them. For fixtures: the inverse of
diffusers' converters, written by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ldm import vae_state
from safetensors.torch import save_file
from tiny_bases import SIDE
from torch import Tensor

State = dict[str, Tensor]
DOUBLE = {
    "norm1_context.linear": "txt_mod.lin",
    "norm1.linear": "img_mod.lin",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_add_out": "txt_attn.proj",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_qkv": "txt_attn.qkv",
    "attn.to_qkv": "img_attn.qkv",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "attn.to_qkv_mlp": "linear1",
    "proj_out": "linear2",
}
FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
JOINT = {
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.norm_added_": "context_block.attn.ln_",
    "attn2.norm_": "x_block.attn2.ln_",
    "attn.norm_": "x_block.attn.ln_",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.add_qkv": "context_block.attn.qkv",
    "attn2.to_qkv": "x_block.attn2.qkv",
    "attn.to_qkv": "x_block.attn.qkv",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
}
SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
Z_IMAGE = {
    "attention.to_qkv": "attention.qkv",
    "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1": "final_layer",
}


def fused(state: Mapping[str, Tensor]) -> State:
    """q, k and v, and in Flux's single blocks the first layer of the MLP, as one matrix."""
    out = dict(state)
    for key in state:
        stem, _, leaf = key.rpartition(".")
        if stem.endswith((".to_q", ".add_q_proj")):
            places = [stem.replace("_q", f"_{x}") for x in "qkv"]
            name = stem.replace("_q_proj", "_qkv").replace("to_q", "to_qkv")
            if "single_" in stem:
                places, name = [*places, stem.replace("attn.to_q", "proj_mlp")], f"{name}_mlp"
            out[f"{name}.{leaf}"] = torch.cat([out.pop(f"{place}.{leaf}") for place in places])
    return out


def renamed(key: str, tables: Sequence[tuple[str, str, Mapping[str, str]]]) -> str:
    """The key with the first entry that fits. `tables`: stem in diffusers, stem of the authors, names after the stem."""
    for stem, theirs, names in tables:
        if not key.startswith(stem):
            continue
        number, _, rest = key[len(stem) :].partition(".") if stem else ("", "", key)
        for one, other in names.items():
            if rest.startswith(one):
                return f"{theirs}{number}{'.' if stem else ''}{other}{rest[len(one) :]}"
    return key


def halves_swapped(value: Tensor) -> Tensor:
    return torch.cat(value.chunk(2)[::-1])


def flux_state(state: Mapping[str, Tensor]) -> State:
    tables = [
        ("transformer_blocks.", "double_blocks.", DOUBLE),
        ("single_transformer_blocks.", "single_blocks.", SINGLE),
        ("", "", FLUX),
    ]
    return {
        renamed(key, tables): halves_swapped(value) if key.startswith("norm_out") else value
        for key, value in fused(state).items()
    }


def sd3_state(state: Mapping[str, Tensor]) -> State:
    last = max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
    swapped = ("norm_out.", f"transformer_blocks.{last}.norm1_context.")
    tables = [("transformer_blocks.", "joint_blocks.", JOINT), ("", "", SD3)]
    return {
        renamed(key, tables): halves_swapped(value) if key.startswith(swapped) else value
        for key, value in fused(state).items()
    }


def z_image_state(state: Mapping[str, Tensor]) -> State:
    tables = [(f"{stem}.", f"{stem}.", Z_IMAGE) for stem in ("layers", "noise_refiner", "context_refiner")]
    return {renamed(key, [*tables, ("", "", Z_IMAGE)]): value for key, value in fused(state).items()}


STATES = {
    "FluxTransformer2DModel": flux_state,
    "SD3Transformer2DModel": sd3_state,
    "ZImageTransformer2DModel": z_image_state,
}


def transformer_state(transformer: Any) -> State:
    """The weights of a transformer in its authors' layout."""
    return STATES[type(transformer).__name__](transformer.state_dict())


def save_transformer(pipe: Any, path: Path, prefix: str = "") -> Path:
    """The transformer alone, as one file."""
    state = {f"{prefix}{key}": value for key, value in transformer_state(pipe.transformer).items()}
    metadata = {"modelspec.resolution": f"{SIDE}x{SIDE}"}  # without it, SD3's pictures would have 1024 px
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    return path


def save_complete(pipe: Any, path: Path, vae: str, size: int, leave_out: str = "-") -> Path:
    """Transformer, autoencoder (with the prefix `vae`) and text encoders in one file, as ComfyUI has it. `size`: in pixels, for
    ModelSpec. `leave_out`: beginning of keys to drop."""
    state = {f"model.diffusion_model.{key}": value for key, value in transformer_state(pipe.transformer).items()}
    state |= vae_state(pipe.vae, vae)
    clips = ["clip_l", "clip_g"] if hasattr(pipe, "text_encoder_3") else ["clip_l"]
    names = [*clips, "t5xxl"]
    for name, part in zip(names, ("text_encoder", "text_encoder_2", "text_encoder_3"), strict=False):
        encoder = getattr(pipe, part, None)
        for key, value in encoder.state_dict().items() if encoder is not None else ():
            inner = "" if name == "t5xxl" or key.startswith(("text_model.", "text_projection")) else "text_model."
            state[f"text_encoders.{name}.transformer.{inner}{key}"] = value
    kept = {key: value.clone().contiguous() for key, value in state.items() if not key.startswith(leave_out)}
    save_file(kept, path, {"modelspec.resolution": f"{size}x{size}"})
    return path
