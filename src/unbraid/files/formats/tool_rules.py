"""The rules by which tools read LoRA files, as data: naming conventions and suffixes of keys, and what happens with other keys.

The facts were established by running or reading the tools (diffusers 0.42.1, ComfyUI and Forge of 2025, InvokeAI
of 2026, A1111 1.10); none of their code is used. `naming` and `style` recognise the conventions.
"""

import re
from dataclasses import dataclass

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
    """One tool. `namings`: family → naming conventions that it loads; if a family is missing, the tool's behaviour is unknown. `styles`: suffix
    styles that it loads. `unknown_allowed`: the number of unknown keys up to which it loads a file (None: any number)."""

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
    """The key in TOOLS for a tool's name, which may be abbreviated and in any case. UsageError for an unknown tool."""
    wanted = "".join(letter for letter in name.lower() if letter.isalnum())
    short = {"comfy": "comfyui", "auto1111": "a1111", "automatic1111": "a1111", "webui": "a1111", "sdwebui": "a1111"}
    short |= {"invoke": "invokeai", "forgeui": "forge", "webuiforge": "forge", "hf": "diffusers"}
    found = short.get(wanted) or next((tool for tool in TOOLS if wanted and tool.startswith(wanted)), None)
    if not found:
        raise UsageError(f"no rules for the tool {name[:40]!r}", "doctor", f"There are: {', '.join(TOOLS)}.")
    return found


def naming(module: str) -> Naming:
    """The naming convention that a file's name of a module follows."""
    return next((name for pattern, name in _NAMINGS if re.match(pattern, module)), "other")


def style(key: str) -> Style:
    """The suffix style of a key."""
    return next((name for pattern, name in _STYLES if re.search(pattern, key)), "other")
