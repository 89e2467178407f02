"""What the tools accept, restated as data: key namings, suffixes, and what they do with the rest.

The facts were established by running or reading the tools (diffusers 0.42.1, ComfyUI and Forge of 2025, InvokeAI
of 2026, A1111 1.10); no code of theirs is here. Namings and suffix styles are told apart by `naming` and `style`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from unbraid.common.errors import UsageError
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.families import DESIGNS

Naming = str  # one of the second column of _NAMINGS, or "other"
Style = str  # one of the second column of _STYLES, or "other"

_NAMINGS: tuple[tuple[str, Naming], ...] = (
    (r"base_model\.model\.", "base_model.model."),
    (r"lora_unet_(double|single|joint)_blocks_", "kohya fused"),
    (r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_|label_emb|out_)", "kohya ldm"),
    (r"lora_unet_", "kohya diffusers"),
    (r"lora_te[123]?_(text_model_|text_projection|encoder_block_)", "kohya text"),
    (r"lora_te[123]?_", "kohya text without text_model"),
    (r"lycoris_", "lycoris"),
    (r"(model\.)?diffusion_model\.", "diffusion_model"),
    (r"unet\.unet\.", "unet.unet."),
    (r"unet\.(input_blocks|middle_block|output_blocks)\.", "unet. ldm"),
    (r"unet\..*\.processor", "unet. processor"),
    (r"unet\..*\.to_", "unet. attention"),
    (r"unet\.", "unet."),
    (r"text_encoder(_[23])?\.", "text_encoder."),
    (r"double_blocks\.|single_blocks\.", "xlabs"),
    (r"transformer\.", "transformer."),
    (r"lora_transformer_", "lora_transformer"),
    (r".*\.processor", "bare processor"),
    (r"(down_blocks|up_blocks|mid_block|conv_in|conv_out)\.", "bare"),
)
_STYLES: tuple[tuple[str, Style], ...] = (
    (r"\.lora_(down|up|mid)\.weight$", "lora_down"),
    (r"\.lora\.(down|up)\.weight$", "lora.down"),
    (r"\.lora_linear_layer\.", "linear_layer"),
    (r"_lora[12]?\.(down|up)\.weight$", "_lora.down"),
    (r"\.lora_[AB](\.weight)?$", "lora_A"),
    (r"\.lora_[AB]\.", "lora_A.name"),
    (r"\.lora\.weight$", "dense"),
)


@dataclass(frozen=True)
class Tool:
    """One tool: the namings that it loads by family (a family that is missing: nothing is known), the suffix
    styles, and how many keys it may not know before it refuses the whole file (None: any number)."""

    name: str
    namings: dict[Family, frozenset[Naming]]
    styles: frozenset[Style]
    unknown_allowed: int | None
    refuses_mixed: bool = False
    none_for: frozenset[Family] = frozenset()  # families that the tool cannot run at all


_KOHYA: frozenset[Naming] = frozenset({"kohya ldm", "kohya diffusers", "kohya text"})
_COMFY: frozenset[Naming] = _KOHYA | {
    "lycoris",
    "diffusion_model",
    "unet.",
    "unet. processor",
    "bare processor",
    "text_encoder.",
}
_DIT: frozenset[Naming] = frozenset(
    {"kohya fused", "kohya text", "transformer.", "diffusion_model", "lora_transformer", "lycoris"}
)
_NEW: frozenset[Naming] = frozenset({"transformer.", "diffusion_model", "kohya diffusers", "kohya fused"})
_DIFFUSERS: frozenset[Naming] = _KOHYA | {"unet.", "unet. attention", "unet. processor", "text_encoder."}
_ALL_STYLES: frozenset[Style] = frozenset(
    {"lora_down", "lora.down", "linear_layer", "_lora.down", "lora_A", "lora_A.name"}
)

TOOLS: dict[str, Tool] = {
    "comfyui": Tool(
        "ComfyUI",
        {
            "sdxl": _COMFY,
            "sd15": _COMFY,
            "sd21": _COMFY,
            "flux": _DIT,
            "sd3": _DIT,
            "qwen-image": _NEW | {"lycoris"},
            "z-image": frozenset({"transformer.", "diffusion_model"}),
        },
        _ALL_STYLES,
        None,
    ),
    "forge": Tool(
        "Forge", {"sdxl": _COMFY, "sd15": _COMFY, "sd21": _COMFY, "flux": _DIT, "sd3": _DIT}, _ALL_STYLES, 12
    ),
    "a1111": Tool(
        "A1111",
        {"sdxl": _KOHYA, "sd15": _KOHYA, "sd21": _KOHYA},
        frozenset({"lora_down"}),
        None,
        none_for=frozenset(DESIGNS) - {"sd3"},
    ),
    "invokeai": Tool(
        "InvokeAI", {"sdxl": _KOHYA, "sd15": _KOHYA, "sd21": _KOHYA}, frozenset({"lora_down"}), 0, refuses_mixed=True
    ),
    "diffusers": Tool(
        "diffusers",
        {
            "sdxl": _DIFFUSERS,
            "sd15": _DIFFUSERS,
            "sd21": _DIFFUSERS,
            "flux2": _NEW,
            "qwen-image": _NEW,
            "z-image": _NEW,
            "flux": frozenset(
                {"kohya fused", "kohya text", "transformer.", "text_encoder.", "lora_transformer", "xlabs"}
            ),
            "sd3": frozenset({"transformer.", "text_encoder."}),
        },
        frozenset({"lora_down", "lora.down", "_lora.down", "lora_A"}),
        None,
    ),
}


def tool_named(name: str) -> str:
    """The key in TOOLS of a tool by its name, in any case, or short. Errors: none such."""
    asked = "".join(letter for letter in name.lower() if letter.isalnum())
    short = {"comfy": "comfyui", "auto1111": "a1111", "automatic1111": "a1111", "webui": "a1111", "sdwebui": "a1111"}
    short |= {"invoke": "invokeai", "forgeui": "forge", "webuiforge": "forge", "hf": "diffusers"}
    found = short.get(asked) or next((tool for tool in TOOLS if asked and tool.startswith(asked)), None)
    if not found:
        raise UsageError(f"no rules for the tool {name[:40]!r}", "doctor", f"There are: {', '.join(TOOLS)}.")
    return found


def naming(module: str) -> Naming:
    """Which naming a file's own name of a module follows."""
    return next((name for pattern, name in _NAMINGS if re.match(pattern, module)), "other")


def style(key: str) -> Style:
    """Which suffix style a key has."""
    return next((name for pattern, name in _STYLES if re.search(pattern, key)), "other")


@cache
def unet_modules(family: Family) -> frozenset[str]:
    """Every Linear and Conv2d of the family's UNet by diffusers path: 794 for SDXL. Empty: no table."""
    if family == "sdxl":
        return frozenset(_unet((0, 2, 10), 10, (10, 2, 0), True))
    return frozenset(_unet((1, 1, 1, 0), 1, (0, 1, 1, 1), False)) if family in ("sd15", "sd21") else frozenset()


def _unet(down: tuple[int, ...], mid: int, up: tuple[int, ...], added: bool) -> Iterator[str]:
    yield from ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    if added:
        yield from ("add_embedding.linear_1", "add_embedding.linear_2")
    for i, depth in enumerate(down):
        for j in range(2):
            # Channels change on entering the second and the third level.
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", i in (1, 2) and j == 0)
            yield from _attention(f"down_blocks.{i}.attentions.{j}", depth)
        if i + 1 < len(down):
            yield f"down_blocks.{i}.downsamplers.0.conv"
    for j in range(2):
        yield from _resnet(f"mid_block.resnets.{j}", False)
    yield from _attention("mid_block.attentions.0", mid)
    for i, depth in enumerate(up):
        for j in range(3):
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", True)
            yield from _attention(f"up_blocks.{i}.attentions.{j}", depth)
        if i + 1 < len(up):
            yield f"up_blocks.{i}.upsamplers.0.conv"


def _resnet(name: str, shortcut: bool) -> Iterator[str]:
    yield from (f"{name}.{leaf}" for leaf in ("conv1", "conv2", "time_emb_proj"))
    if shortcut:
        yield f"{name}.conv_shortcut"


def _attention(name: str, depth: int) -> Iterator[str]:
    if depth:
        yield from (f"{name}.proj_in", f"{name}.proj_out")
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        yield from (f"{block}.attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0"))
        yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")
