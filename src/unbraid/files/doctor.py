"""`unbraid doctor`: what a tool would load from a LoRA file, drop or refuse, and the command that mends the file.

Judged by the header, without torch. Of the weights only alphas are read, and all values are searched for NaN.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from unbraid.files.formats.blocks import Family
from unbraid.files.formats.families import DESIGNS
from unbraid.files.formats.gate import missing
from unbraid.files.formats.header import Catalogue, Header, catalogue, consistent, read_header
from unbraid.files.formats.kinds import VECTORS
from unbraid.files.formats.tool_rules import TOOLS, Naming, Tool, naming, style, tool_named
from unbraid.files.formats.unets import unet_modules
from unbraid.files.formats.weights import alphas, broken, silent
from unbraid.files.formats.widths import other_base

_NORM = {*VECTORS, "diff", "alpha"}  # parts that a norm can have; norms are not in the table of UNet modules
CONVERTED = {"LoHa", "LoKr", "full changes"}  # kinds that `convert` turns into plain LoRAs


@dataclass(frozen=True)
class Diagnosis:
    """What one tool does with a file. `loads`: how many of its `modules` are loaded. `dropped`: key → reason. `refused`: the reason why
    nothing is loaded, or "". `warnings`: other problems. `mend`: the command that mends the file, or ""."""

    tool: str
    family: Family
    modules: int
    loads: int
    dropped: Mapping[str, str]
    refused: str
    warnings: tuple[str, ...]
    mend: str
    known: bool = True  # False: unbraid does not know what the tool does with this family

    @property
    def healthy(self) -> bool:
        return self.known and not (self.dropped or self.refused or self.warnings)


def diagnose(path: str | Path, tool: str, weights: bool = True) -> Diagnosis:
    """Judge a file by a tool's rules for keys. `weights=False` reads the header alone.

    Errors: unknown tools, unreadable files.
    """
    return diagnoses(path, [tool], weights)[0]


def diagnoses(path: str | Path, tools: Iterable[str], weights: bool = True) -> list[Diagnosis]:
    """Judge a file by the rules of several tools. The file is read once."""
    rules = [TOOLS[tool_named(tool)] for tool in tools]
    header = read_header(Path(path))
    found = catalogue(header)
    numbers = look(header, found) if weights else Numbers({}, (), False)
    return [judge(header, found, one, numbers) for one in rules]


@dataclass(frozen=True)
class Numbers:
    """Facts about a file's values. `alphas`: key → value. `not_finite`: keys with NaN or infinity. `silent`: all weights are 0."""

    alphas: Mapping[str, float]
    not_finite: tuple[str, ...]
    silent: bool


def look(header: Header, found: Catalogue) -> Numbers:
    """Read the facts about a file's values that all tools share."""
    ups = [parts[part] for parts in found.modules.values() for part in ("up", "dense") if part in parts]
    return Numbers(alphas(header), broken(header), bool(ups) and not found.kinds and silent(header, ups))


def judge(header: Header, found: Catalogue, tool: Tool, numbers: Numbers) -> Diagnosis:
    """What one tool does with a file."""
    family = found.verdict.family
    plain = {name for name, parts in found.modules.items() if {"down", "up"} <= set(parts) or "dense" in parts}
    warnings = _warnings(header, found, tool, numbers)
    namings = Counter(naming(raw) for raw in found.raw.values())
    if not _knows(tool, found, namings) or (found.kinds and not plain):
        mend = _mend(header, found, tool, namings, numbers) if found.kinds and not numbers.not_finite else ""
        return Diagnosis(tool.name, family, len(found.modules), 0, {}, "", warnings, mend, known=False)
    dropped = _dropped(header, found, tool, family)
    if tool.name == "diffusers":
        _diffusers_mixed(namings, found, dropped)
    shapes = {name: header.shapes[parts["down"]] for name, parts in found.modules.items() if "down" in parts}
    base = other_base(family, shapes)
    refused = _refused(header, found, tool, family, dropped, namings)
    if base and tool.name == "diffusers":
        warnings += (f"{base}: it loads into that base alone",)
    elif base:
        refused = f"{base}: it is for another base"
    loads = 0 if refused else sum(not any(key in dropped for key in found.modules[name].values()) for name in plain)
    mend = ""
    if (dropped or refused or warnings) and not base and not numbers.not_finite and not numbers.silent:
        mend = _mend(header, found, tool, namings, numbers)
    return Diagnosis(tool.name, family, len(found.modules), loads, dropped, refused, warnings, mend)


def _knows(tool: Tool, found: Catalogue, namings: Counter[Naming]) -> bool:
    """Whether the rules cover what the tool does with such a file."""
    family = found.verdict.family
    if family in tool.none_for:
        return True
    if family in ("flux", "sd3"):
        return family in tool.namings
    if family in DESIGNS:
        return family in tool.namings and set(namings) - {"text_encoder.", "kohya text"} <= tool.namings[family]
    return not found.kept or len(found.kept) < len(found.modules)


def _dropped(header: Header, found: Catalogue, tool: Tool, family: Family) -> dict[str, str]:
    """Key → the reason why the tool ignores it."""
    accepted = tool.namings.get(family) or tool.namings["sdxl"]
    table = unet_modules(family)
    dropped = dict.fromkeys(found.unknown, "not a known LoRA key")
    for module, parts in found.modules.items():
        raw = found.raw[module]
        how, path = naming(raw), module.removeprefix("unet.")
        why = ""
        if module in found.kept:
            why = "no module of this base is known by this name"
        elif how not in accepted:
            why = f"{tool.name} does not know the names {_example(how, raw)}"
        elif table and module.startswith("unet.") and path not in table and set(parts) - _NORM:
            why = f"{family} has no such module"
        for part, key in parts.items():
            if why:
                dropped[key] = why
            elif part != "alpha" and style(key) not in tool.styles | {"other"}:
                dropped[key] = f"{tool.name} does not know the ending {key.removeprefix(raw)}"
    return dropped


def _diffusers_mixed(namings: Counter[Naming], found: Catalogue, dropped: dict[str, str]) -> None:
    if namings["kohya ldm"] and namings["kohya diffusers"]:
        for module, raw in found.raw.items():
            if naming(raw) == "kohya ldm":
                reason = "diffusers drops all LDM names, silently, where both namings are in one file"
                dropped.update(dict.fromkeys(found.modules[module].values(), reason))


def _refused(
    header: Header, found: Catalogue, tool: Tool, family: Family, dropped: Mapping[str, str], namings: Counter[Naming]
) -> str:
    """The reason why the tool loads nothing from the file, or ""."""
    if not found.modules:
        return "there is no LoRA in it"
    if family in tool.none_for:
        return f"{tool.name} cannot run {family} models"
    if tool.refuses_mixed and namings["kohya ldm"] and namings["kohya diffusers"]:
        return "both namings of the UNet in one file: partially converted"
    if tool.unknown_allowed is not None and len(dropped) > tool.unknown_allowed:
        return f"{len(dropped)} keys that it does not know; it allows {tool.unknown_allowed}"
    if tool.name == "InvokeAI" and family in ("sdxl", "sd15", "sd21", "unknown") and not _identifiable(header, found):
        return "it cannot tell the base model: there is no attn2.to_k in it"
    if tool.name == "diffusers":
        return _diffusers_refuses(header, found, namings)
    return ""


def _diffusers_refuses(header: Header, found: Catalogue, namings: Counter[Naming]) -> str:
    if namings["unet.unet."]:
        return "the doubled prefix unet.unet. (NoMatchingPeftModuleError)"
    kohya = sum(n for name, n in namings.items() if name.startswith("kohya"))
    if kohya and kohya < len(found.raw):
        return "kohya names beside others"
    has_alpha = any("alpha" in parts for parts in found.modules.values())
    if has_alpha and "lora_adapter_metadata" in header.metadata:
        return "alphas and lora_adapter_metadata in one file"
    return ""


def _identifiable(header: Header, found: Catalogue) -> bool:
    """Whether InvokeAI can tell the base: it looks at the input width of attn2.to_k, or for a third transformer block."""
    for module, parts in found.modules.items():
        if module.endswith("attn2.to_k") and header.shapes.get(parts.get("down", ""), ())[-1:] in (
            (2048,),
            (768,),
            (1024,),
        ):
            return True
        if re.search(r"\.transformer_blocks\.([2-9]|\d\d)\.", module):
            return True
    return False


def _warnings(header: Header, found: Catalogue, tool: Tool, numbers: Numbers) -> tuple[str, ...]:
    out = [f"NaN or infinite weights, such as {key}: broken pictures" for key in numbers.not_finite[:1]]
    if numbers.silent:
        out.append("all its weights are 0: it changes nothing")
    out += [f"{n} tensors of {kind}: not a plain LoRA, not judged" for kind, n in found.kinds.items()]
    if lacking := {name: what for name, parts in found.modules.items() if (what := missing(parts))}:
        name, what = next(iter(lacking.items()))
        out.append(f"{len(lacking)} modules are incomplete: {name} has no {what}")
    if found.twice:
        out.append(f"{len(found.twice)} modules are there twice; one of each pair is lost")
    if found.adapters:
        out.append(f"several adapters in one file: {', '.join(found.adapters[:5])}")
    if found.ignored:
        out.append(f"{len(found.ignored)} embeddings come with it, which are not judged")
    if tool.name == "diffusers" and len(set(numbers.alphas.values())) > 1:
        out.append("alphas differ between modules; diffusers uses one for all attention layers: wrong strengths")
    peft = any(style(key).startswith("lora_A") for parts in found.modules.values() for key in parts.values())
    if peft and tool.name != "diffusers" and _alpha_matters(header):
        out.append(f"alpha is only in the diffusers settings, which {tool.name} does not read: wrong strength")
    return tuple(out)


def _alpha_matters(header: Header) -> bool:
    text = header.metadata.get("lora_adapter_metadata", "")
    ranks, alphas_ = (re.findall(rf'"[\w.]*\b{key}": ([\d.]+)', text) for key in ("r", "lora_alpha"))
    try:
        return [float(r) for r in ranks] != [float(a) for a in alphas_]
    except ValueError:
        return True


def _example(how: Naming, raw: str) -> str:
    return f"of this kind ({how}): {raw[:60]}…" if how != "other" else raw[:60]


def _mend(header: Header, found: Catalogue, tool: Tool, namings: Counter[Naming], numbers: Numbers) -> str:
    """The command that mends the file. Empty if there is none, or if it would write the same file again."""
    family, path = found.verdict.family, header.path
    whole = found.modules and not (found.unknown or found.twice or found.adapters or found.kept)
    whole = whole and not found.kinds.keys() - CONVERTED and consistent(header, found)
    if not whole or family in tool.none_for or (family in DESIGNS and not DESIGNS[family].diffusers):
        return ""
    to = "diffusers" if family in DESIGNS else "kohya"
    kohya = {"kohya ldm" if family == "sdxl" else "kohya diffusers", "kohya text"}
    own = {"transformer.", "text_encoder."} if to == "diffusers" else kohya
    if not found.kinds and set(namings) <= own and len(set(numbers.alphas.values())) < 2 and not _alpha_matters(header):
        return ""
    out = path.with_name(f"{path.stem}-fixed.safetensors")
    return f"unbraid convert {shlex.quote(str(path))} {shlex.quote(str(out))} --to {to}"
