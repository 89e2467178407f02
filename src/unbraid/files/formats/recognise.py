"""Recognising the family of a LoRA's base, from shapes, names and metadata (the first is trusted most); names of a family's modules."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from unbraid.files.formats.blocks import Family
from unbraid.files.formats.families import DESIGNS
from unbraid.files.formats.names import bare, canonical, transformer_path

Shape = tuple[int, ...]
_INPUTS = (
    "to_q",
    "qkv",
    "q_proj",
    "self_attn.q",
    "wq",
    "linear1",
    "to_qkv_mlp_proj",
)  # leaves whose input is the hidden state
_FAMILIES: tuple[tuple[str, Family], ...] = (
    ("sdxl", "sdxl"),
    ("stablediffusionxl", "sdxl"),
    ("sdv1", "sd15"),
    ("sd15", "sd15"),
    ("sd1", "sd15"),
    ("stablediffusionv1", "sd15"),
    ("sdv2", "sd21"),
    ("sd2", "sd21"),
    ("stablediffusionv2", "sd21"),
    ("sd3", "sd3"),
    ("stablediffusion3", "sd3"),
    ("flux2", "flux2"),
    ("flux1", "flux"),
    ("flux", "flux"),
    ("qwenimage", "qwen-image"),
    ("zimage", "z-image"),
    ("chroma", "chroma"),
    ("hidream", "hidream"),
    ("wan", "wan"),
    ("anima", "anima"),
    ("krea2", "krea2"),
    ("lumina", "lumina2"),
    ("hunyuanvideo", "hunyuan-video"),
)


@dataclass(frozen=True)
class Fit:
    """A name that matches a template of a family. `path`: the name with dots; `stem`, `block`: name and number of its block."""

    template: str
    path: str
    stem: str
    block: int


@dataclass(frozen=True)
class Verdict:
    """A family. `by`: how it was recognised, `shapes`, `names`, `metadata` or `likely` (a guess); `nothing` if it is unknown."""

    family: Family
    by: str


def recognise(shapes: Mapping[str, tuple[Shape, Shape]], metadata: Mapping[str, str]) -> Verdict:
    """The family of a LoRA. `shapes`: the file's name of a module → the shapes of down and up, empty if unknown."""
    unet = {name: module for module in shapes if (name := canonical(module))}
    if any(name.startswith("unet.") for name in unet) or not shapes or len(unet) == len(shapes):
        return _unet(unet, shapes, metadata)
    return _transformer({m: both for m, both in shapes.items() if m not in unet.values()}, metadata)


def named_family(metadata: Mapping[str, str]) -> Family | None:
    """The family that the metadata names, None if they name none."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        text = re.sub(r"[^a-z0-9]", "", metadata.get(key, "")[:80].lower())
        found: Family | None = next((family for start, family in _FAMILIES if text.startswith(start)), None)
        if found:
            return found
    return None


def name_in(module: str, family: Family) -> str | None:
    """unbraid's name for a module of a family: diffusers' path, or the original path if it contains several of diffusers' modules.
    None if it is unknown, or if the family's names are kept as they are."""
    name = canonical(module)
    if name or family not in DESIGNS:
        return name
    fit = template_of(module, family)
    return f"transformer.{fit.path}" if fit and fit.template not in DESIGNS[family].kept else None


@cache
def template_of(module: str, family: Family) -> Fit | None:
    """The template of a family that a module's name matches; None if there is none."""
    rest, dotted = transformer_path(module)
    for template in _index(family).get(_normal(rest), ()):
        path = _filled(template, rest)
        if path and path == (rest if dotted else path) and (dotted or path.replace(".", "_") == rest):
            found = re.search(r"([A-Za-z_]+)\.(\d{1,4})\.", path) if "*" in template else None
            return Fit(template, path, found[1] if found else "", int(found[2]) if found else 0)
    return None


def split_names(module: str, family: Family) -> tuple[str, ...]:
    """The diffusers modules that a module with an original name contains; any other module contains only itself."""
    fit = template_of(module, family) if family in DESIGNS else None
    inside = DESIGNS[family].original.get(fit.template) if fit else None
    if not fit or not inside:
        return (module,)
    return tuple(f"transformer.{numbered(leaf, fit)}" for leaf in inside)


def both_ways(modules: Iterable[str], family: Family) -> list[str]:
    """Modules that a file has both fused and split."""
    there = set(modules)
    return [name for name in there for part in split_names(name, family) if part != name and part in there]


def numbered(template: str, fit: Fit) -> str:
    """A template with the number of the module's block inserted."""
    return template.replace("*", str(fit.block))


@cache
def _index(family: Family) -> dict[str, list[str]]:
    design, out = DESIGNS[family], {}
    for template in dict.fromkeys((*design.diffusers, *design.original, *design.kept)):
        out.setdefault(_normal(template), []).append(template)
    return out


def _normal(name: str) -> str:
    return "_".join("#" if word.isdigit() or word == "*" else word for word in name.replace(".", "_").split("_"))


def _filled(template: str, name: str) -> str | None:
    """The template with the numbers of the name inserted; None if the name does not match it."""
    words, parts = name.replace(".", "_").split("_"), re.split(r"([._])", template)
    if len(words) != len(parts[::2]):
        return None
    for i, word in enumerate(words):
        if parts[2 * i] == "*":
            if not word.isascii() or len(word) > 4 or word != str(int(word)):
                return None
            parts[2 * i] = word
        elif parts[2 * i] != word:
            return None
    return "".join(parts)


def _transformer(shapes: Mapping[str, tuple[Shape, Shape]], metadata: Mapping[str, str]) -> Verdict:
    fits: dict[Family, dict[str, Fit]] = {
        family: {m: f for m in shapes if (f := template_of(m, family))} for family in DESIGNS
    }
    best = max(len(found) for found in fits.values())
    named: list[Family] = [family for family, found in fits.items() if len(found) == best]
    if 2 * best <= len(shapes):
        return Verdict("unknown", "nothing")
    left: list[Family] = [family for family in named if _possible(family, fits[family], shapes)]
    if len(left) == 1:
        return Verdict(left[0], "names" if len(named) == 1 else "shapes")
    wide: list[Family] = [family for family in left if _width(fits[family], shapes) in DESIGNS[family].widths]
    if len(wide) == 1:
        return Verdict(wide[0], "shapes")
    left, named_by = wide or left, named_family(metadata)
    if named_by in left:
        return Verdict(named_by, "metadata")
    streams = any(fit.stem.startswith(("single", "double")) for fit in fits["flux"].values())
    return Verdict("flux", "likely") if "flux" in left and streams else Verdict("unknown", "nothing")


def _possible(family: Family, fits: Mapping[str, Fit], shapes: Mapping[str, tuple[Shape, Shape]]) -> bool:
    """Whether all blocks exist in the family, and all weights have its proportions."""
    design = DESIGNS[family]
    for module, fit in fits.items():
        if fit.block >= design.blocks.get(fit.stem, 10_000):
            return False
        down, up = shapes[module]
        rows = design.rows.get(fit.template)
        if rows and len(down) > 1 and up and up[0] != rows * down[1]:
            return False
    return True


def _width(fits: Mapping[str, Fit], shapes: Mapping[str, tuple[Shape, Shape]]) -> int:
    widths = Counter(
        shapes[module][0][1]
        for module, fit in fits.items()
        if fit.template.endswith(_INPUTS) and len(shapes[module][0]) > 1
    )
    return widths.most_common(1)[0][0] if widths else 0


def _unet(names: Mapping[str, str], shapes: Mapping[str, tuple[Shape, Shape]], metadata: Mapping[str, str]) -> Verdict:
    """SDXL, SD1.5 or SD2.1: from the width of the text embeddings, from blocks that only one of them has, or else a guess."""
    for name, module in names.items():
        down = shapes[module][0]
        found = _TEXT_WIDTHS.get(down[-1] if down and name.endswith(("attn2.to_k", "attn2.to_v")) else 0)
        if found:
            return Verdict(found, "shapes")
    named = named_family(metadata)
    if any(".up_blocks.3." in name or ".down_blocks.3." in name for name in names):
        return Verdict("sd21", "metadata") if named == "sd21" or _wide_text(names, shapes) else Verdict("sd15", "names")
    if named in ("sdxl", "sd15", "sd21"):
        return Verdict(named, "metadata")
    return _likely(names)


_TEXT_WIDTHS: dict[int, Family] = {2048: "sdxl", 768: "sd15", 1024: "sd21"}


def _wide_text(names: Mapping[str, str], shapes: Mapping[str, tuple[Shape, Shape]]) -> bool:
    """Whether the text encoder is OpenCLIP H, which is 1024 wide."""
    tail = ("self_attn.q_proj", "mlp.fc1")
    return any(
        n.startswith("text_encoder.") and n.endswith(tail) and shapes[m][0][1:2] == (1024,) for n, m in names.items()
    )


def _likely(names: Mapping[str, str]) -> Verdict:
    if any(name.startswith("text_encoder_2.") for name in names):
        return Verdict("sdxl", "names")
    if any(re.search(r"(input|output)_blocks|middle_block", bare(raw)[:60]) for raw in names.values()):
        return Verdict("sdxl", "likely")  # no tool writes LDM names for SD1.5
    if any(re.search(r"\.transformer_blocks\.[1-9]", name) for name in names):
        return Verdict("sdxl", "names")
    if any(raw.startswith("lora_te_") for raw in names.values()):
        return Verdict("sd15", "names")
    return Verdict("unknown", "nothing")
