"""`unbraid doctor`: what a tool would load of a LoRA file, drop, or refuse; and the line that mends it.

From the header alone: no torch, no weights (but for the alphas, and a look for NaN).
"""

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unbraid.errors import UsageError
from unbraid.formats.blocks import Family
from unbraid.formats.header import Catalogue, Header, catalogue, family_of, read_header
from unbraid.formats.kinds import KIND
from unbraid.formats.loaders import TOOLS, Naming, Tool, naming, style, unet_modules
from unbraid.formats.weights import alphas, broken

CONVERTED = set(KIND.values()) - {"DoRA"}  # what `convert` makes plain, or keeps


@dataclass(frozen=True)
class Diagnosis:
    """A tool's way with a file: modules loaded, key → why it is dropped, why all is refused, what else is amiss."""

    tool: str
    family: Family
    modules: int
    loads: int
    dropped: Mapping[str, str]
    refused: str
    warnings: tuple[str, ...]
    mend: str
    known: bool = True  # False: unbraid has no facts on the tool with this family

    @property
    def healthy(self) -> bool:
        return self.known and not (self.dropped or self.refused or self.warnings)


def diagnose(path: str | Path, tool: str, weights: bool = True) -> Diagnosis:
    """Judge a file by a tool's key rules. `weights=False` skips the look at the numbers.

    Errors: unknown tools, unreadable files.
    """
    if tool not in TOOLS:
        raise UsageError(f"no rules for the tool {tool!r}", "doctor", f"There are: {', '.join(TOOLS)}.")
    header = read_header(Path(path))
    return judge(
        header, catalogue(header), TOOLS[tool], alphas(header) if weights else {}, broken(header) if weights else ()
    )


def judge(
    header: Header, found: Catalogue, tool: Tool, alpha: Mapping[str, float], not_finite: tuple[str, ...] = ()
) -> Diagnosis:
    """The verdict on a header; `alpha`: key → value, `not_finite`: keys with NaN."""
    family = family_of(header, found)
    if family in ("flux", "sd3") and family not in tool.namings and family not in tool.none_for:
        return Diagnosis(tool.name, family, len(found.modules), 0, {}, "", (), "", known=False)
    dropped = _dropped(header, found, tool, family)
    namings = Counter(naming(raw) for raw in found.raw.values())
    if tool.name == "diffusers":
        _diffusers_mixed(namings, found, dropped)
    refused = _refused(header, found, tool, family, dropped, namings)
    loads = 0 if refused else sum(not any(key in dropped for key in parts.values()) for parts in found.modules.values())
    warnings = _warnings(header, found, tool, alpha, not_finite)
    mendable = (
        not found.unknown
        and not found.kinds.keys() - CONVERTED
        and not found.twice
        and not not_finite
        and found.modules
    )
    good = not (dropped or refused or warnings)
    mend = _mend(header.path, family) if mendable and not good and family not in tool.none_for else ""
    return Diagnosis(tool.name, family, len(found.modules), loads, dropped, refused, warnings, mend)


def _dropped(header: Header, found: Catalogue, tool: Tool, family: Family) -> dict[str, str]:
    """Key → why the tool does not use it."""
    accepted = tool.namings.get(family) or tool.namings["sdxl"]
    table = unet_modules(family)
    dropped = dict.fromkeys(found.unknown, "not a known LoRA key")
    for module, parts in found.modules.items():
        raw = found.raw[module]
        how, path = naming(raw), module.removeprefix("unet.")
        why = ""
        if how not in accepted:
            why = f"{tool.name} does not know the names {_example(how, raw)}"
        elif table and module.startswith("unet.") and path not in table:
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
    """Why the tool would not load anything of the file; empty if it would."""
    if not found.modules:
        return "there is no LoRA in it"
    if family in tool.none_for:
        return f"{tool.name} cannot run {family} models"
    if tool.refuses_mixed and namings["kohya ldm"] and namings["kohya diffusers"]:
        return "both namings of the UNet in one file: partially converted"
    if tool.unknown_allowed is not None and len(dropped) > tool.unknown_allowed:
        return f"{len(dropped)} keys that it does not know; it allows {tool.unknown_allowed}"
    if tool.name == "InvokeAI" and family in ("sdxl", "sd15", "unknown") and not _identifiable(header, found):
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
    """InvokeAI knows the base by attn2.to_k's input width, or by a third transformer block."""
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


def _warnings(
    header: Header, found: Catalogue, tool: Tool, alpha: Mapping[str, float], not_finite: tuple[str, ...]
) -> tuple[str, ...]:
    out = [f"NaN or infinite weights, such as {not_finite[0]}: black or broken pictures"] if not_finite else []
    out += [f"{n} tensors of {kind}: not a plain LoRA, not judged" for kind, n in found.kinds.items()]
    if found.twice:
        out.append(f"{len(found.twice)} modules are there twice; one of each pair is lost")
    if found.adapters:
        out.append(f"several adapters in one file: {', '.join(found.adapters)}")
    if tool.name == "diffusers" and len(set(alpha.values())) > 1:
        out.append("alphas differ between modules; diffusers uses one for all attention layers: wrong strengths")
    peft = any(style(key).startswith("lora_A") for parts in found.modules.values() for key in parts.values())
    if peft and tool.name != "diffusers" and _alpha_matters(header):
        out.append(f"alpha is only in the diffusers settings, which {tool.name} does not read: wrong strength")
    return tuple(out)


def _alpha_matters(header: Header) -> bool:
    text = header.metadata.get("lora_adapter_metadata", "")
    ranks, alphas_ = (re.findall(rf'"[\w.]*\b{key}": ([\d.]+)', text) for key in ("r", "lora_alpha"))
    return [float(r) for r in ranks] != [float(a) for a in alphas_]


def _example(how: Naming, raw: str) -> str:
    return f"of this kind ({how}): {raw[:60]}…" if how != "other" else raw[:60]


def _mend(path: Path, family: Family) -> str:
    out = path.with_name(f"{path.stem}-fixed.safetensors")
    to = "diffusers" if family in ("flux", "sd3") else "kohya"
    return f"unbraid convert {shlex.quote(str(path))} {shlex.quote(str(out))} --to {to}"
