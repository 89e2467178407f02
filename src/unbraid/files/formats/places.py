"""Where a module's weight is in a checkpoint of SDXL, SD1.5 or SD2.1: single files (LDM names) and diffusers' UNet files.

OpenCLIP's text encoders store q, k and v in one matrix, and the last projection transposed. Pure Python.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from unbraid.files.formats.blocks import from_ldm, to_ldm

Shapes = Mapping[str, tuple[int, ...]]
UNETS = (
    "model.diffusion_model.",
    "diffusion_model.",
    "",
)  # prefixes of whole checkpoints, and of UNets that some tools save alone
TEXTS: tuple[tuple[str, str, bool], ...] = (  # (component, prefix, whether it is an OpenCLIP)
    ("text_encoder", "conditioner.embedders.0.transformer.text_model.", False),
    ("text_encoder_2", "conditioner.embedders.1.model.", True),
    ("text_encoder", "cond_stage_model.transformer.text_model.", False),
    ("text_encoder", "cond_stage_model.transformer.", False),
    ("text_encoder", "cond_stage_model.model.", True),
)
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BACK = {theirs: ours for ours, theirs in OPEN_CLIP.items()}
_QKV = {f"self_attn.{letter}_proj": i for i, letter in enumerate("qkv")}
_CLIP = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Place:
    """A module's tensor. `third`: the third of its rows that belongs to the module, None for all. `transposed`: it is stored as [k, d]."""

    key: str
    third: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """The names in a checkpoint. `unet`: the UNet's prefix, None without a UNet. `ldm`: whether it has LDM names. `texts`: component →
    (prefix, whether it is an OpenCLIP)."""

    shapes: Shapes
    unet: str | None
    ldm: bool
    texts: Mapping[str, tuple[str, bool]]


def layout(shapes: Shapes) -> Layout:
    """The layout of a checkpoint, from the keys that it has."""
    ldm = next((prefix for prefix in UNETS if f"{prefix}input_blocks.0.0.weight" in shapes), None)
    plain = (
        "" if ldm is None and "conv_in.weight" in shapes and "down_blocks.0.resnets.0.conv1.weight" in shapes else None
    )
    texts: dict[str, tuple[str, bool]] = {}
    for component, prefix, open_clip in TEXTS:
        mark = "transformer.resblocks.0.ln_1.weight" if open_clip else "encoder.layers.0.layer_norm1.weight"
        if prefix + mark in shapes:
            texts.setdefault(component, (prefix, open_clip))
    return Layout(shapes, plain if ldm is None else ldm, ldm is not None, texts)


def place(names: Layout, module: str, leaf: str = "weight") -> Place | None:
    """Where the weight or bias of a module is, such as `unet.down_blocks.…`; None if the file does not have it."""
    component, _, path = module.partition(".")
    if component == "unet" and names.unet is not None:
        paths = [to_ldm(path, "sdxl"), to_ldm(path, "sd15")] if names.ldm else [path]
        found = [Place(f"{names.unet}{one}.{leaf}") for one in paths if one]
    elif component in names.texts:
        prefix, open_clip = names.texts[component]
        found = _open_clip(prefix, path, leaf) if open_clip else [Place(prefix + _short(path) + f".{leaf}")]
    else:
        found = []
    return next((one for one in found if one.key in names.shapes), None)


def modules(names: Layout) -> Iterator[str]:
    """Every module that can have a LoRA: linear layers and convolutions of the UNet and of the text encoders' blocks."""
    for key, shape in names.shapes.items():
        for name in _names(names, key) if len(shape) in (2, 4) else ():
            found = place(names, name)
            if found and found.key == key:
                yield name


def _names(names: Layout, key: str) -> tuple[str, ...]:
    """The modules whose weights a tensor may contain, from its key."""
    stem, _, leaf = key.rpartition(".")
    for component, (prefix, open_clip) in names.texts.items():
        if key.startswith(prefix):
            return _text_names(component, key.removeprefix(prefix), open_clip)
    if names.unet is None or leaf != "weight" or not key.startswith(names.unet):
        return ()
    path = stem.removeprefix(names.unet)
    path = from_ldm(path) if names.ldm else path
    return (f"unet.{path}",) if path else ()


def _text_names(component: str, rest: str, open_clip: bool) -> tuple[str, ...]:
    start = f"{component}.text_model."
    if not open_clip:
        stem = rest.removesuffix(".weight")
        return (start + stem,) if _CLIP.fullmatch(stem) and rest.endswith(".weight") else ()
    found = _BLOCK.fullmatch(rest)
    if not found:
        return ()
    layer = f"{start}encoder.layers.{found[1]}."
    if found[2] == "attn.in_proj_weight":
        return tuple(layer + leaf for leaf in _QKV)
    ours = _BACK.get(found[2].removesuffix(".weight"))
    return (layer + ours,) if ours and found[2].endswith(".weight") else ()


def _short(path: str) -> str:
    return path.removeprefix("text_model.")


def _open_clip(prefix: str, path: str, leaf: str) -> list[Place]:
    if path == "text_projection":
        return [Place(f"{prefix}text_projection", transposed=True)]
    if path == "text_model.final_layer_norm":
        return [Place(f"{prefix}ln_final.{leaf}")]
    found = _LAYER.fullmatch(path)
    if not found:
        return []
    block = f"{prefix}transformer.resblocks.{found[1]}."
    if found[2] in _QKV:
        return [Place(f"{block}attn.in_proj_{leaf}", _QKV[found[2]])]
    return [Place(f"{block}{OPEN_CLIP.get(found[2], found[2])}.{leaf}")]
