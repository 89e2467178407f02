"""Where a module's weight stands in a checkpoint of SDXL, SD1.5 or SD2.1: single files (LDM names) and diffusers' UNet files.

OpenCLIP's text encoders have q, k and v in one matrix, and the last projection transposed. Pure Python.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from unbraid.files.formats.blocks import from_ldm, to_ldm

Shapes = Mapping[str, tuple[int, ...]]
UNETS = ("model.diffusion_model.", "diffusion_model.", "")  # whole checkpoints; UNets alone, as some tools save them
TEXTS: tuple[tuple[str, str, bool], ...] = (  # component, prefix, whether it is an OpenCLIP
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
    """A tensor's key; `third`: which third of its rows is the module's; `transposed`: it is [k, d]."""

    key: str
    third: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """What a file calls its parts: the UNet's prefix (None: it has no UNet) and whether in LDM names; component → prefix, OpenCLIP."""

    shapes: Shapes
    unet: str | None
    ldm: bool
    texts: Mapping[str, tuple[str, bool]]


def layout(shapes: Shapes) -> Layout:
    """By the names that are there."""
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


def place(there: Layout, module: str, leaf: str = "weight") -> Place | None:
    """Where the weight or the bias of a module (diffusers' path, its component in front) is; None: the file has none such."""
    component, _, path = module.partition(".")
    if component == "unet" and there.unet is not None:
        paths = [to_ldm(path, "sdxl"), to_ldm(path, "sd15")] if there.ldm else [path]
        found = [Place(f"{there.unet}{one}.{leaf}") for one in paths if one]
    elif component in there.texts:
        prefix, open_clip = there.texts[component]
        found = _open_clip(prefix, path, leaf) if open_clip else [Place(prefix + _short(path) + f".{leaf}")]
    else:
        found = []
    return next((one for one in found if one.key in there.shapes), None)


def modules(there: Layout) -> Iterator[str]:
    """Every linear layer and convolution of the UNet and of the text encoders' blocks: what LoRAs are made for."""
    for key, shape in there.shapes.items():
        for name in _names(there, key) if len(shape) in (2, 4) else ():
            found = place(there, name)
            if found and found.key == key:
                yield name


def _names(there: Layout, key: str) -> tuple[str, ...]:
    """The modules whose weight a key might be."""
    stem, _, leaf = key.rpartition(".")
    for component, (prefix, open_clip) in there.texts.items():
        if key.startswith(prefix):
            return _text_names(component, key.removeprefix(prefix), open_clip)
    if there.unet is None or leaf != "weight" or not key.startswith(there.unet):
        return ()
    path = stem.removeprefix(there.unet)
    path = from_ldm(path) if there.ldm else path
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
