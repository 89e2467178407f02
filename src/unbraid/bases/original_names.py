"""Where each weight of a transformer is in a single file: under diffusers' name, or in the layout of the model's authors
(Black Forest Labs, Stability AI, Alibaba), which ComfyUI's files have too. There q, k and v are one matrix.

The names of linear layers are those of LoRA files (`unbraid.files.formats.families`). Below are the other ones. diffusers has
converters too; the tests compare with them. Its converter for Flux is written for one width, and none of them says which
weight is missing before it loads the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from unbraid.files.formats.design_flux import LAST
from unbraid.files.formats.families import DESIGNS
from unbraid.files.formats.header import Shape

Kind = Literal["flux", "sd3", "z-image"]
_SD3_NORMS = {
    f"joint_blocks.*.{stream}.ln_{x}": f"transformer_blocks.*.{ours.format(x)}"
    for stream, ours in (
        ("x_block.attn", "attn.norm_{}"),
        ("x_block.attn2", "attn2.norm_{}"),
        ("context_block.attn", "attn.norm_added_{}"),
    )
    for x in "qk"
}
_FLUX_NORMS = {
    f"double_blocks.*.{stream}_attn.norm.{name}_norm": f"transformer_blocks.*.attn.norm_{added}{name[0]}"
    for stream, added in (("img", ""), ("txt", "added_"))
    for name in ("query", "key")
} | {
    f"single_blocks.*.norm.{name}_norm": f"single_transformer_blocks.*.attn.norm_{name[0]}" for name in ("query", "key")
}
_Z_IMAGE = {
    f"{stem}.*.attention.{x}_norm": f"{stem}.*.attention.norm_{x}"
    for stem in ("layers", "noise_refiner", "context_refiner")
    for x in "qk"
} | {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
NORMS: Mapping[Kind, Mapping[str, str]] = {"flux": _FLUX_NORMS, "sd3": _SD3_NORMS, "z-image": _Z_IMAGE}
WHOLE = {"pos_embed": "pos_embed.pos_embed"}  # a key without a module
UNUSED = ("norm_final.weight",)  # of Z-Image: the stock model does not read it
SWAPPED = LAST[
    "final_layer.adaLN_modulation.1"
]  # diffusers has scale before shift, the authors have shift before scale


@dataclass(frozen=True)
class Part:
    """Where a weight is: in these rows of a tensor. `swapped`: whether its halves are in the opposite order."""

    key: str
    rows: slice
    shape: Shape
    swapped: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The weight, from its rows of the tensor."""
        return tensor.roll(len(tensor) // 2, 0) if self.swapped else tensor


def parts(shapes: Mapping[str, Shape], kind: Kind) -> dict[str, Part]:
    """diffusers' name of a weight → where it is. `shapes`: the keys of the file, without prefix. Keys that are in no table
    have diffusers' names."""
    return {name: part for key in shapes if key not in UNUSED for name, part in _inside(key, shapes, kind)}


def _inside(key: str, shapes: Mapping[str, Shape], kind: Kind) -> Iterator[tuple[str, Part]]:
    """The weights in one tensor."""
    names, shape = _names(key, kind), shapes[key] or (1,)  # a single number has no rows
    module = key.rpartition(".")[0]
    columns = shapes.get(f"{module}.weight", shape)[-1]
    # Flux's single blocks have q, k, v and the first layer of the MLP in one matrix
    hidden = shape[0] // len(names) if len(names) < 4 else columns
    start = 0
    for i, name in enumerate(names):
        end = shape[0] if i == len(names) - 1 else start + hidden
        # SD3's last block has scale and shift for its text alone
        last = ".context_block.adaLN" in module and shape[0] == 2 * columns
        swapped = last or (name.rpartition(".")[0] in SWAPPED and name != key)
        yield name, Part(key, slice(start, end), (end - start, *shape[1:]), swapped)
        start = end


def _names(key: str, kind: Kind) -> tuple[str, ...]:
    """diffusers' names of the weights in a tensor."""
    module, _, leaf = key.rpartition(".")
    words = module.split(".")
    number = words[1] if len(words) > 1 and words[1].isdigit() else ""
    template = ".".join([words[0], "*", *words[2:]]) if number else module
    if found := DESIGNS[kind].original.get(template):
        return tuple(f"{name.replace('*', number)}.{leaf}" for name in found)
    if norm := NORMS[kind].get(template):
        return (f"{norm.replace('*', number)}.{'weight' if leaf == 'scale' else leaf}",)
    return (WHOLE.get(key, key),)
