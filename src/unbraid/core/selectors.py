"""Which layers serve content and which style: exact selectors of layers, tables of published roles, and files of measured ones.

A selector is the path of a module, in diffusers' names: it selects that module and all in it. Whole parts are compared, so
`transformer_blocks.0` selects neither `single_transformer_blocks.0` nor `transformer_blocks.01`. A part may be a number range
(`single_transformer_blocks.10-37`) or `*`, any one part (`up_blocks.*.attentions.1`). The component (`unet.`,
`transformer.`) may be in front.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from unbraid.common.atomic import read_toml
from unbraid.common.errors import UsageError, suggestion

ROLES = ("content", "style")
Blocks = Mapping[str, tuple[str, ...]]  # role → selectors of the layers that control it
COMPONENT = re.compile(r"^(unet|transformer)\.")
PART = re.compile(r"[A-Za-z_]\w*|\d{1,4}|(?P<low>\d{1,4})-(?P<high>\d{1,4})|\*", re.ASCII)
FORM = 'Write content = ["up_blocks.0.attentions.0"], style = [...].'


@dataclass(frozen=True)
class Table:
    """A table of roles: for which family of bases, by whom, its selectors, and the name of the base that it was measured on."""

    family: str
    source: str
    blocks: Blocks
    base: str = ""


TABLES: Mapping[str, Table] = {
    "b-lora": Table(
        "sdxl",
        "B-LoRA, arXiv 2403.14572",
        {"content": ("up_blocks.0.attentions.0",), "style": ("up_blocks.0.attentions.1",)},
    ),
    "unziplora": Table(
        "sdxl",
        "UnZipLoRA, arXiv 2412.04465",
        {
            "content": ("up_blocks.0.attentions.0", "up_blocks.0.attentions.2"),
            "style": ("up_blocks.0.attentions.1", "up_blocks.1.attentions"),
        },
    ),
    "splitflux": Table(
        "flux",
        "SplitFlux, arXiv 2511.15258",
        {"content": ("single_transformer_blocks.0-9",), "style": ("single_transformer_blocks.10-37",)},
    ),
    "b-lora-flux": Table(
        "flux",
        "betyavan/b-lora-flux, 2026, by swapped prompts; it contradicts SplitFlux",
        {"content": ("transformer_blocks.5-12",), "style": ("transformer_blocks.0-1",)},
    ),
    "icons": Table(
        "sdxl",
        "unbraid probe-blocks icons, docs/blocks.md",
        {
            "content": ("up_blocks.0.attentions.1", "up_blocks.0.attentions.2"),
            "style": ("up_blocks.1.attentions.0", "up_blocks.1.attentions.2", "down_blocks.1.attentions.1"),
        },
        base="icons",  # the benchmark's rows by role depend on it: a change needs new versions of them
    ),
}
USUAL: dict[str, Blocks] = {  # family → the roles that count where nothing else is known
    "sdxl": TABLES["unziplora"].blocks,
    "sd15": {  # by analogy with SDXL (the same place in the decoder); not measured
        "content": ("up_blocks.1.attentions.0", "up_blocks.1.attentions.2"),
        "style": ("up_blocks.1.attentions.1", "up_blocks.2.attentions", "up_blocks.3.attentions"),
    },
}
USUAL |= {"sd21": USUAL["sd15"]}
UNKNOWN = "which layers of this base serve content, and which style, is not known"
MEASURE = "Give --blocks (`unbraid probe-blocks` measures them)."


def known_roles(base: str, family: str) -> Blocks:
    """The roles that were measured on a base, by its name or the last part of its path, else the usual ones of its family. Empty if
    nothing is known."""
    return measured_roles(base) or USUAL.get(family, {})


def measured_roles(base: str) -> Blocks:
    """The roles that were measured on a base, by its name or the last part of its path. Empty if none were."""
    name = Path(base).name
    return next((table.blocks for table in TABLES.values() if table.base and table.base == name), {})


def left_out(blocks: Blocks, role: str) -> tuple[str, ...]:
    """Selectors of the layers that a LoRA of a role leaves out: those of the other role. Layers without a role are everyone's."""
    return tuple(one for other in ROLES if other != role for one in blocks.get(other, ()))


@lru_cache(1024)
def _pattern(selector: str) -> re.Pattern[str]:
    parts = []
    for part in COMPONENT.sub("", selector).split("."):
        found = PART.fullmatch(part)
        if not found:
            fix = "Give a module's path, such as up_blocks.0.attentions.1 or single_transformer_blocks.10-37."
            raise UsageError(f"{part!r} is no part of a module's path", selector[:80], fix)
        if found["low"]:
            low, high = int(found["low"]), int(found["high"])
            if low > high:
                raise UsageError(f"{part} is no range", selector[:80], "Give the lower number first.")
            parts.append(f"(?:{'|'.join(map(str, range(low, high + 1)))})")
        else:
            parts.append(r"[^.]+" if part == "*" else re.escape(part))
    return re.compile(r"\.".join(parts) + r"(?:\.|$)")


def selects(selectors: Iterable[str], module: str) -> bool:
    """Whether one of the selectors selects a module. Raises UsageError for a malformed selector."""
    path = COMPONENT.sub("", module)
    return any(_pattern(one).match(path) for one in selectors)


def chosen(blocks: Blocks, modules: Iterable[str], where: object) -> dict[str, tuple[str, ...]]:
    """Role → the modules that it selects, in their order. `where`: for errors. Raises UsageError if a selector selects nothing,
    or a module has both roles."""
    some = list(modules)
    for selector in (one for role in ROLES for one in blocks.get(role, ())):
        if not any(selects((selector,), module) for module in some):
            groups = ", ".join(groups_of(some)[:12])
            raise UsageError(f"{selector!r} selects no layer", where, f"There are: {groups}.")
    found = {role: tuple(module for module in some if selects(blocks.get(role, ()), module)) for role in ROLES}
    if twice := [module for module in found["content"] if module in found["style"]]:
        raise UsageError(f"{twice[0]} is in content and in style", where, "Give each layer one role.")
    return found


def groups_of(modules: Iterable[str]) -> list[str]:
    """The smallest numbered groups of layers: the paths up to the attention group of a UNet, or the block of a transformer."""
    form = re.compile(r"^(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+|^\w+\.\d+")
    paths = (COMPONENT.sub("", module) for module in modules)
    return list(dict.fromkeys(found[0] for path in paths if (found := form.match(path))))


def open_blocks(name: str) -> Blocks:
    """The roles of layers: one of the `TABLES` by its name, or a TOML file with `content`, `style` and perhaps `source`.

    Raises UsageError if there is no such table or file, or the file has another form."""
    if name in TABLES:
        return TABLES[name].blocks
    if not Path(name).is_file():
        raise UsageError("there is no such table of blocks, nor file", name, suggestion(name, TABLES))
    return blocks_in(read_toml(Path(name), FORM), name)


def blocks_in(table: Mapping[str, Any], where: object) -> Blocks:
    """The roles of layers that a table of a TOML file states. `where`: for errors. Raises UsageError if it has another form."""
    if unknown := table.keys() - {*ROLES, "source"}:
        raise UsageError(f"{min(unknown)!r} is no role", where, FORM)
    for role in ROLES:
        some = table.get(role)
        if not isinstance(some, list) or not some or not all(isinstance(one, str) for one in some):
            raise UsageError(f"{role} is no list of selectors", where, FORM)
        selects(some, "")
    return {role: tuple(table[role]) for role in ROLES}
