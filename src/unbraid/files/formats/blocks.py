"""The block tables of SD1.5 and SDXL: diffusers paths ↔ LDM paths ↔ block-weight (LBW) names. Pure Python.

The rule, for both families: `down_blocks.i.*.j` is `input_blocks.(3i+j+1)`, `up_blocks.i.*.j` is
`output_blocks.(3i+j)`. It assumes two layers per block, as SD1.5, SDXL and the embedded base have.
"""

import re
from typing import Literal

Family = Literal[
    "sdxl",
    "sd15",
    "sd21",
    "flux",
    "flux2",
    "sd3",
    "qwen-image",
    "z-image",
    "chroma",
    "hidream",
    "wan",
    "anima",
    "krea2",
    "lumina2",
    "hunyuan-video",
    "unknown",
]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_RESNET_BACK = {ldm: name for name, ldm in _RESNET.items()}
_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_SINGLE_BACK = {ldm: name for name, ldm in _SINGLE.items()}
_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_LDM_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d+)\.(.+)")


def to_ldm(path: str, family: Family = "sdxl") -> str | None:
    """The LDM path of a UNet module, from its diffusers path; None if there is none."""
    if path in _SINGLE:
        return _SINGLE[path]
    found = _BLOCK.fullmatch(path)
    if not found:
        return None
    side, block, kind, layer, leaf = found.groups()
    if kind == "resnets":
        if leaf not in _RESNET:
            return None
        leaf = _RESNET[leaf]
    if side is None:
        sub = {"resnets": 2 * int(layer), "attentions": 1}.get(kind)
        return None if sub is None else f"middle_block.{sub}.{leaf}"
    i, j = int(block), int(layer)
    if kind == "downsamplers":
        return f"input_blocks.{3 * i + 3}.0.op"
    if kind == "upsamplers":
        # the last layer of its block, which comes after the attention if the block has one
        has_attention = i > 0 if family in ("sd15", "sd21") else i < 2
        return f"output_blocks.{3 * i + 2}.{2 if has_attention else 1}.conv"
    sub = 0 if kind == "resnets" else 1
    return f"input_blocks.{3 * i + j + 1}.{sub}.{leaf}" if side == "down" else f"output_blocks.{3 * i + j}.{sub}.{leaf}"


def from_ldm(path: str) -> str | None:
    """The diffusers path of a UNet module, from its LDM or diffusers path; None for an LDM name that is not in the table."""
    if path in _SINGLE_BACK:
        return _SINGLE_BACK[path]
    found = _LDM_BLOCK.fullmatch(path)
    if not found:
        return None if path.startswith(("input_blocks", "middle_block", "output_blocks", "out.")) else path
    side, block, sub, leaf = found.groups()
    if leaf in _RESNET_BACK:
        leaf = _RESNET_BACK[leaf]
    if side is None:
        kind = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}.get(sub)
        return None if kind is None else f"mid_block.{kind}.{leaf}"
    if side == "input":
        i, j = divmod(int(block) - 1, 3)
        if j == 2:
            return f"down_blocks.{i}.downsamplers.0.conv" if leaf == "op" else None
        return f"down_blocks.{i}.{'resnets' if sub == '0' else 'attentions'}.{j}.{leaf}"
    i, j = divmod(int(block), 3)
    if leaf == "conv":
        return f"up_blocks.{i}.upsamplers.0.conv"
    return f"up_blocks.{i}.{'resnets' if sub == '0' else 'attentions'}.{j}.{leaf}"


def block_of(module: str) -> str:
    """The block-weight name of a module: IN00…IN11, MID, OUT00…OUT11; BASE for text encoders and embeddings.

    Transformers have no block-weight names; for them it is the name of the block, such as `transformer_blocks.3`.
    """
    component, _, path = module.partition(".")
    if component not in ("unet", "text_encoder", "text_encoder_2", "text_encoder_3"):
        found = re.search(
            r"(?<![A-Za-z0-9])([A-Za-z_]{1,40})[._](\d{1,4})(?![0-9])", path if component == "transformer" else module
        )
        return f"{re.sub('^lora_unet_', '', found[1])}.{found[2]}" if found else "BASE"
    ldm = to_ldm(path) if component == "unet" else None
    found = re.match(r"(input|output)_blocks\.(\d+)\.|middle_block", ldm or "")
    if not found:
        return "BASE"
    return {"input": "IN", "output": "OUT"}[found[1]] + f"{int(found[2]):02d}" if found[1] else "MID"
