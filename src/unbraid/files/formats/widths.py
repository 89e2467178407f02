"""Widths of the published UNets' layers, to recognise LoRAs for other bases of the same design. Pure Python."""

from collections.abc import Mapping

from unbraid.files.formats.blocks import Family

_LEAVES = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "proj_in", "ff.net.0.proj")
_SMALL = {"down_blocks.0": 320, "down_blocks.1": 640, "down_blocks.2": 1280, "mid_block": 1280}
_SMALL |= {"up_blocks.1": 1280, "up_blocks.2": 640, "up_blocks.3": 320}
_WIDTHS: dict[Family, dict[str, int]] = {
    "sdxl": {"down_blocks.1": 640, "down_blocks.2": 1280, "mid_block": 1280, "up_blocks.0": 1280, "up_blocks.1": 640},
    "sd15": _SMALL,
    "sd21": _SMALL,
}
Shape = tuple[int, ...]


def width(family: Family, module: str) -> int | None:
    """The number of input channels of an attention layer in the family's UNet; None for layers that are not in the table."""
    component, _, path = module.partition(".")
    if component != "unet" or not path.endswith(_LEAVES):
        return None
    stem = path.split(".")
    return _WIDTHS.get(family, {}).get(stem[0] if stem[0] == "mid_block" else ".".join(stem[:2]))


def other_base(family: Family, shapes: Mapping[str, Shape]) -> str:
    """Why a LoRA cannot be for the published base of its family; empty if it can. `shapes`: module → shape of down."""
    for module, shape in shapes.items():
        wide = width(family, module)
        if wide and len(shape) > 1 and shape[1] != wide:
            return f"its base's layers are {shape[1]} wide where {family}'s are {wide}"
    return ""
