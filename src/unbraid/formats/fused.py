"""Flux's and SD3's two layouts: kohya's files fuse q, k, v (and the MLP) into one matrix, diffusers splits them.

In memory everything is split. Splitting slices the rows of `up` and shares `down`; fusing shares `down` where all
parts have the same one, and otherwise stacks them (rank 3r or 4r) over a block-diagonal `up`. Both are exact.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from unbraid.errors import UsageError
from unbraid.lora import Lora
from unbraid.lowrank import matrices, wide

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADD = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_FF = {"0": "net.0.proj", "2": "net.2", "fc1": "net.0.proj", "fc2": "net.2"}
# (original block, diffusers block) → original leaf → diffusers leaves
LAYOUT: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("double_blocks", "transformer_blocks"): {
        "img_attn.qkv": _QKV,
        "txt_attn.qkv": _ADD,
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
    }
    | {f"img_mlp.{i}": (f"ff.{_FF[i]}",) for i in "02"}
    | {f"txt_mlp.{i}": (f"ff_context.{_FF[i]}",) for i in "02"},
    ("single_blocks", "single_transformer_blocks"): {
        "linear1": (*_QKV, "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
    ("joint_blocks", "transformer_blocks"): {
        "x_block.attn.qkv": _QKV,
        "x_block.attn2.qkv": tuple(leaf.replace("attn", "attn2") for leaf in _QKV),
        "context_block.attn.qkv": _ADD,
        "x_block.attn.proj": ("attn.to_out.0",),
        "x_block.attn2.proj": ("attn2.to_out.0",),
        "context_block.attn.proj": ("attn.to_add_out",),
        "x_block.adaLN_modulation.1": ("norm1.linear",),
        "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    }
    | {f"x_block.mlp.{i}": (f"ff.{_FF[i]}",) for i in ("fc1", "fc2")}
    | {f"context_block.mlp.{i}": (f"ff_context.{_FF[i]}",) for i in ("fc1", "fc2")},
}
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "context_embedder": "context_embedder",
} | {
    f"{old}_in.{layer}": f"time_text_embed.{new}_embedder.linear_{i}"
    for old, new in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
    for i, layer in ((1, "in_layer"), (2, "out_layer"))
}
_ORIGINAL = re.compile(r"transformer\.(double_blocks|single_blocks|joint_blocks)\.(\d+)\.(.+)")
_BLOCKS = {old: (new, leaves) for (old, new), leaves in LAYOUT.items()}


def split_names(module: str) -> tuple[str, ...] | None:
    """The diffusers modules that an original Flux or SD3 module holds; itself if it is none; None: not known."""
    found = _ORIGINAL.fullmatch(module)
    if found:
        block, leaves = _BLOCKS[found[1]]
        inside = leaves.get(found[3])
        return tuple(f"transformer.{block}.{found[2]}.{leaf}" for leaf in inside) if inside else None
    component, _, path = module.partition(".")
    return (f"transformer.{TOP[path]}",) if component == "transformer" and path in TOP else (module,)


def split(module: str, lora: Lora) -> dict[str, Lora]:
    """One module in diffusers' layout: one or several. Rank components that a part does not use are left out."""
    names = split_names(module)
    if names is None:
        raise UsageError(
            "the module has no place in Flux's or SD3's block table", module, "Is the file for another model?"
        )
    if len(names) == 1:
        return {names[0]: _swapped(module, lora)}
    down, up = matrices(lora)
    hidden = len(up) // 3 if len(names) == 3 else down.shape[1]
    sizes = [hidden] * 3 + ([len(up) - 3 * hidden] if len(names) == 4 else [])
    if sum(sizes) != len(up) or min(sizes) < 0:
        raise UsageError(f"{len(up)} rows cannot be q, k and v", module, "The file is damaged.")
    empty = not bool(up.any())
    out = {}
    for name, part in zip(names, up.split(sizes), strict=True):
        used = part.new_ones(part.shape[1], dtype=torch.bool) if empty else (part != 0).any(0)
        if len(part) and bool(used.any()):
            out[name] = _columns(down, part, used, lora.alpha)
    return out


def fuse(modules: Mapping[str, Lora], family: str) -> dict[str, Lora]:
    """Everything in the original layout, for kohya's files. Text encoders stay as they are."""
    groups: dict[str, dict[int, Lora]] = {}
    leaves: dict[str, tuple[str, ...]] = {}
    for name, lora in modules.items():
        original, place, parts = _original(name, family)
        groups.setdefault(original, {})[place] = lora
        leaves[original] = parts
    return {
        name: _swapped(name, found[0]) if len(leaves[name]) == 1 else _fused(found, len(leaves[name]))
        for name, found in groups.items()
    }


def _original(module: str, family: str) -> tuple[str, int, tuple[str, ...]]:
    """The original module, this one's place in it, and all that it holds."""
    component, _, path = module.partition(".")
    if component != "transformer":
        return module, 0, (module,)
    for old, new in TOP.items():
        if path == new:
            return f"transformer.{old}", 0, (new,)
    found = re.fullmatch(r"([a-z_]+)\.(\d+)\.(.+)", path)
    for (old, new), table in LAYOUT.items() if found else ():
        if found and found[1] == new and (old == "joint_blocks") == (family == "sd3"):
            for leaf, parts in table.items():
                if found[3] in parts:
                    return f"transformer.{old}.{found[2]}.{leaf}", parts.index(found[3]), parts
    raise UsageError(f"the module has no place in {family}'s block table", module, "Write it with --to diffusers.")


def _columns(down: Tensor, up: Tensor, used: Tensor, alpha: float) -> Lora:
    if bool(used.all()):
        return Lora(down, up, alpha)
    return Lora(down[used], up[:, used], alpha * int(used.sum()) / len(down))


def _fused(parts: Mapping[int, Lora], count: int) -> Lora:
    some = next(iter(parts.values()))
    hidden = some.down.shape[1]
    sizes = {
        place: len(parts[place].up) if place in parts else hidden * (4 if place == 3 else 1) for place in range(count)
    }
    scales = {place: lora.alpha / len(lora.down) for place, lora in parts.items()}
    shared = all(torch.equal(lora.down, some.down) and lora.alpha == some.alpha for lora in parts.values())
    if shared:
        ups = [parts[i].up if i in parts else some.up.new_zeros(sizes[i], len(some.down)) for i in range(count)]
        return Lora(some.down, torch.cat(ups), some.alpha)
    common = next(iter(scales.values()))
    down = torch.cat([lora.down for _, lora in sorted(parts.items())])
    columns = []
    for place, lora in sorted(parts.items()):
        up = lora.up if scales[place] == common else wide(lora.up) * (scales[place] / common)
        before = sum(sizes[i] for i in range(place))
        after = sum(sizes[i] for i in range(place + 1, count))
        columns.append(torch.cat([up.new_zeros(before, up.shape[1]), up, up.new_zeros(after, up.shape[1])]))
    return Lora(down, torch.cat(columns, 1), common * len(down))


def _swapped(module: str, lora: Lora) -> Lora:
    """diffusers has scale and shift the other way round in the last layer's modulation (2·k outputs)."""
    last = "final_layer.adaLN" in module or ("adaLN_modulation" in module and len(lora.up) == 2 * lora.down.shape[1])
    return Lora(lora.down, torch.cat(lora.up.chunk(2)[::-1]), lora.alpha) if last else lora
