"""What a method says of itself. Everything that lists methods is made from it: the command line, Python, `explain`, the docs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unbraid.core.recipe import Recipe

ROLES = ("content", "style")
Blocks = Mapping[str, tuple[str, ...]]  # role → prefixes of the layers that are known to serve it
Method = Callable[..., tuple[Recipe, ...]]
Check = Callable[[Mapping[str, Sequence[Image.Image]], Mapping[str, Sequence[Path]]], list[str]]


@dataclass(frozen=True)
class Output:
    """One LoRA file: the adapters in it, the role of the prompt that it goes with, and whether learned gates
    are folded in (masks always are)."""

    adapters: tuple[str, ...]
    prompt: str
    gates: bool = True


@dataclass(frozen=True)
class Entry:
    """A method. Its settings are the keyword-only arguments of `make`."""

    name: str
    verb: str  # of the command line
    make: Method
    prompts: Mapping[str, str]  # role → template over the words given and {rare}; one that lacks its words is left out.
    # Empty: the words are the prompts
    outputs: Callable[[Mapping[str, Any]], dict[str, Output]]  # settings → file stem → output
    title: str
    paper: str
    check: Check = lambda images, files: []  # of the opened pictures by role: raises UsageError, or returns warnings
    version: int = 1  # raised when the same settings train other LoRAs: results of the benchmark depend on it


def split_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """A content LoRA and a style LoRA."""
    del settings
    return {role: Output((role,), role) for role in ROLES}


def zip_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """Both LoRAs, or one file of both."""
    roles = tuple(settings["roles"])
    return {"merged": Output(roles, "both")} if settings["single"] else {role: Output((role,), role) for role in roles}
