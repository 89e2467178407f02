"""Prints the tables of docs/files.md: how much each tool loads of the files that unbraid writes.
`python -m tools.loader_table`

It writes tiny LoRAs on every module of each family and applies the rules of `unbraid doctor` to the files.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from unbraid.core.lora import Lora
from unbraid.files.doctor import judge, look
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.encode import Dialect
from unbraid.files.formats.families import DESIGNS
from unbraid.files.formats.header import catalogue, read_header
from unbraid.files.formats.spelling import DIALECTS, dense, spelled
from unbraid.files.formats.tool_rules import TOOLS
from unbraid.files.formats.unets import unet_modules
from unbraid.files.formats.widths import width
from unbraid.files.lora_file import write
from unbraid.files.tools import convert

LAYERS = {"text_encoder": 12, "text_encoder_2": 32}  # CLIP-L, OpenCLIP bigG
LEAVES = (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Row:
    """A row of a table. `tools`: tool → how much it loads (`yes`, `234 of 794`, `no`, `?` if unknown, `–` if the tool does
    not support the family)."""

    family: Family
    dialect: str
    modules: int
    tools: dict[str, str]


def names(family: Family) -> list[str]:
    """All modules that a LoRA of the family can contain: linear layers and convolutions of the denoiser and the text
    encoders."""
    if family in DESIGNS:
        return [f"transformer.{name.replace('*', '0')}" for name in DESIGNS[family].diffusers if "*" in name]
    encoders = LAYERS if family == "sdxl" else {"text_encoder": 12}
    text = [
        f"{e}.text_model.encoder.layers.{i}.{leaf}" for e, n in encoders.items() for i in range(n) for leaf in LEAVES
    ]
    return [f"unet.{name}" for name in sorted(unet_modules(family))] + text


def written() -> Iterator[Row]:
    """Rows for every family, written in every dialect."""
    families: tuple[Family, ...] = ("sdxl", "sd15", "flux", "flux2", "sd3", "qwen-image", "z-image")
    dialects: tuple[Dialect, ...] = ("kohya", "diffusers")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        for family in families:
            modules = {name: _lora(name, family) for name in names(family)}
            for dialect in dialects:
                write(path, modules, family=family, dialect=dialect)
                yield Row(family, dialect, len(modules), _verdicts(path, family))


def converted() -> Iterator[Row]:
    """Rows for every SDXL dialect that can be read, converted to the dialect that unbraid writes by default."""
    modules = {name: _lora(name, "sdxl") for name in names("sdxl")}
    files = {
        name: spelled({module: one for module, one in modules.items() if re.search(spelling.only, module)}, spelling)
        for name, spelling in DIALECTS.items()
    }
    files["dense; ziplora-pytorch"] = dense({name: one for name, one in modules.items() if name.startswith("unet.")})
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        for name, tensors in files.items():
            save_file(tensors, source)
            done = convert(source, path)
            yield Row("sdxl", name, done.modules, _verdicts(path, "sdxl"))


def markdown(rows: Iterable[Row], what: str) -> str:
    """The rows as a Markdown table. `what`: the heading of the dialect column."""
    lines = [f"| family | {what} | modules | " + " | ".join(tool.name for tool in TOOLS.values()) + " |"]
    lines.append("|---" * (3 + len(TOOLS)) + "|")
    for row in rows:
        lines.append(f"| {row.family} | {row.dialect} | {row.modules} | " + " | ".join(row.tools.values()) + " |")
    return "\n".join(lines)


def _lora(name: str, family: Family) -> Lora:
    """A LoRA with the input widths by which families are recognised, and output widths that can be split into q, k, v and
    MLP in fused layers."""
    text = {"sdxl": 2048, "sd15": 768}.get(family, 6) if name.endswith("attn2.to_k") else 6
    rows = {"proj_mlp": 24, "net.0.proj": 24, "linear_in": 36, "to_qkv_mlp_proj": 54}
    tall = next((n for leaf, n in rows.items() if name.endswith(leaf)), 6)
    return Lora(torch.ones(1, width(family, name) or text), torch.ones(tall, 1), 1.0)


def _verdicts(path: Path, family: Family) -> dict[str, str]:
    header = read_header(path)
    found = catalogue(header)
    numbers = look(header, found)
    out = {}
    for name, tool in TOOLS.items():
        verdict = judge(header, found, tool, numbers)
        if family in tool.none_for:
            out[name] = "–"
        elif not verdict.known:
            out[name] = "?"
        elif verdict.refused or not verdict.loads:
            out[name] = "no"
        else:
            out[name] = "yes" if verdict.healthy else f"{verdict.loads} of {verdict.modules}"
    return out


if __name__ == "__main__":
    print(markdown(converted(), "read"))
    print()
    print(markdown(written(), "written"))
