"""The diffusion transformers of 2026 as data: the names of their modules in each convention, and their widths. Pure Python.

A template is a module's path with `*` in place of the number of a block or an expert. `diffusers`: diffusers' names. `original`: the
authors' names, which kohya's files also use, each with the diffusers modules that it contains. `kept`: names without a known
counterpart; they are recognised, and written as they were read. Sources: the models of diffusers 0.42 and its LoRA loaders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Templates = tuple[str, ...]


@dataclass(frozen=True)
class Design:
    """One family. `blocks`: stem → highest number of blocks. `widths`: hidden sizes of the published models. `rows`: template → number of
    rows divided by number of columns of the weight, where that distinguishes families. `kohya`: which names follow `lora_unet_` in kohya's
    files, empty if unknown."""

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
    """Templates for each leaf in the blocks of each stem."""
    return tuple(f"{stem}.*.{leaf}" for stem in stems.split() for leaf in leaves.split())


def pairs(old: str, new: str, leaves: Mapping[str, str]) -> dict[str, Templates]:
    """Original template → diffusers templates, for the blocks of one stem. `leaves`: original leaf → diffusers leaves."""
    return {f"{old}.*.{a}": tuple(f"{new}.*.{b}" for b in leaf.split()) for a, leaf in leaves.items()}
