"""diffusers pipelines as single files: LDM names, as the checkpoints on model-sharing sites have them. For fixtures."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unbraid.files.formats.blocks import Family, to_ldm

State = dict[str, Tensor]
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_single_file(pipe: Any, path: Path, *, size: int, leave_out: str = "-", **marks: str) -> Path:
    """`size`: pixels, for ModelSpec. `leave_out`: a prefix of keys to drop. `marks`: further metadata; an empty value is a key of the
    file with an empty tensor, as `v_pred` and `ztsnr` are."""
    state = unet_state(pipe.unet) | vae_state(pipe.vae, "first_stage_model.")
    if getattr(pipe, "text_encoder_2", None) is not None:
        state |= clip_state(pipe.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        state |= open_clip_state(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipe.text_encoder.config.hidden_act == "gelu":
        state |= open_clip_state(pipe.text_encoder, "cond_stage_model.model.")
    else:
        state |= clip_state(pipe.text_encoder, "cond_stage_model.transformer.text_model.")
    state |= {key: torch.zeros(0) for key, value in marks.items() if not value}
    given_metadata = {"modelspec.resolution": f"{size}x{size}"} | {
        key.replace("__", "."): value for key, value in marks.items() if value
    }
    kept = {key: value.contiguous() for key, value in state.items() if not key.startswith(leave_out)}
    save_file(kept, path, given_metadata)
    return path


def save_header(state: State, path: Path, **metadata: str) -> Path:
    """Write a file with a header of these tensors in fp16 and a hole in place of the data, so it takes no disk space."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, value in state.items():
        begin, end = end, end + 2 * value.numel()
        header[key] = {"dtype": "F16", "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def unet_state(unet: Any) -> State:
    family: Family = "sdxl" if unet.config["addition_embed_type"] else "sd15"
    out = {}
    for key, value in unet.state_dict().items():
        module, _, leaf = key.rpartition(".")
        ldm = "out.0" if module == "conv_norm_out" else to_ldm(module, family)
        out[f"model.diffusion_model.{ldm}.{leaf}"] = value
    return out


def vae_state(vae: Any, prefix: str = "") -> State:
    levels = len(vae.config["block_out_channels"])
    out = {}
    for key, value in vae.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", name)
        name = re.sub(r"(up\.\d+)\.resnets\.(\d+)", r"\1.block.\2", name).replace("upsamplers.0", "upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
        name = re.sub(r"attn_1\.to_([qkv])", r"attn_1.\1", name).replace("attn_1.to_out.0", "attn_1.proj_out")
        is_matrix = ".attn_1." in name and name.endswith("weight") and value.ndim == 2
        out[prefix + name] = value[:, :, None, None] if is_matrix else value
    return out


def clip_state(encoder: Any, prefix: str) -> State:
    return {prefix + key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}


def open_clip_state(encoder: Any, prefix: str) -> State:
    """A state dict in OpenCLIP's form: q, k and v in one matrix, the projection transposed."""
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    out = {
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
    }
    if "text_projection.weight" in state:
        out["text_projection"] = state.pop("text_projection.weight").T
    for key in [key for key in state if ".self_attn.q_proj." in key]:
        parts = [state.pop(key.replace("q_proj", f"{one}_proj")) for one in "qkv"]
        name = key.replace("encoder.layers", "transformer.resblocks").replace("self_attn.q_proj.", "attn.in_proj_")
        out[name] = torch.cat(parts)
    for key, value in state.items():
        name = key.replace("encoder.layers", "transformer.resblocks")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        out[name] = value
    return {prefix + key: value for key, value in out.items()}
