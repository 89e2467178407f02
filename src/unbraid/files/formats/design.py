"""The diffusion transformers of 2026 as data: what their modules are called, by whom, and how wide they are. Pure Python.

A template is a module's path with `*` for the number of a block or an expert. `diffusers` are diffusers' names; `original` are
the authors' own (which kohya's files use too), each with the diffusers modules that it holds. `kept` are names that have no
known counterpart: they are recognised, and written as they were read. Sources: the models of diffusers 0.42 and its LoRA loaders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Templates = tuple[str, ...]


@dataclass(frozen=True)
class Design:
    """One family. `blocks`: stem → how many there are at most. `widths`: of the published sizes. `rows`: template → rows of the
    weight over its columns, where that tells families apart. `kohya`: whose names follow `lora_unet_`; empty: nobody's are known."""

    base: str
    architecture: str
    diffusers: Templates = ()
    original: Mapping[str, Templates] = field(default_factory=dict)
    kept: Templates = ()
    blocks: Mapping[str, int] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    kohya: Literal["original", "diffusers", ""] = ""


def many(stems: str, leaves: str) -> Templates:
    """Every leaf in every block of every stem."""
    return tuple(f"{stem}.*.{leaf}" for stem in stems.split() for leaf in leaves.split())


def pairs(old: str, new: str, leaves: Mapping[str, str]) -> dict[str, Templates]:
    """original template → diffusers templates, of one stem's blocks."""
    return {f"{old}.*.{a}": tuple(f"{new}.*.{b}" for b in leaf.split()) for a, leaf in leaves.items()}
