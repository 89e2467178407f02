"""What a method declares about itself. Everything that lists methods is made from it: the command line, Python, `explain`, the docs,
the self-test and the tests of every base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
class Input:
    """Files that a method starts from, under the name of their role."""

    role: str
    kind: Literal["picture", "pictures", "LoRA", "module"] = "picture"
    optional: bool = False  # pictures that are not given are drawn, by the role's LoRA or by the base


@dataclass(frozen=True)
class Inputs:
    """All that a method starts from, and which of its settings depend on it."""

    files: tuple[Input, ...]
    set_by_verb: tuple[str, ...] = ()  # settings that the verb derives from its inputs; nobody gives them by hand
    shortest: Mapping[str, Any] = field(
        default_factory=dict
    )  # settings of a run of two steps that changes every picture,
    # where the usual ones (`unbraid.runs.shortest`) do not do
    check: Check = lambda images, files: []  # of the opened pictures by role: raises UsageError, or returns warnings

    def of_kind(self, *kinds: str) -> tuple[Input, ...]:
        """The files of some kinds."""
        return tuple(one for one in self.files if one.kind in kinds)


def two(kind: Literal["LoRA", "module"]) -> tuple[Input, ...]:
    """A content and a style, and the pictures that each was trained on."""
    return (*(Input(role, kind) for role in ROLES), *(Input(role, "pictures", optional=True) for role in ROLES))


ONE_PICTURE = Inputs((Input("image"),))
TWO_LORAS = Inputs(two("LoRA"), set_by_verb=("roles",))


@dataclass(frozen=True)
class Entry:
    """A method. Its settings are the keyword-only arguments of `make`, whose docstring describes each as `name: text.`"""

    name: str
    verb: str  # of the command line
    make: Method
    prompts: Mapping[str, str]  # role → template over the words given and {rare}; one that lacks its words is left out.
    # Empty: the words are the prompts
    outputs: Callable[[Mapping[str, Any]], dict[str, Output]]  # settings → file stem → output
    title: str
    paper: str
    inputs: Inputs
    version: int = 1  # raised when the same settings train other LoRAs: results of the benchmark depend on it


def split_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """A content LoRA and a style LoRA."""
    del settings
    return {role: Output((role,), role) for role in ROLES}


def zip_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """Both LoRAs, or one file of both."""
    roles = tuple(settings["roles"])
    return {"merged": Output(roles, "both")} if settings["single"] else {role: Output((role,), role) for role in roles}
