"""What a method declares about itself. The command line, the Python functions, `explain`, the docs, the self-test and the
tests are made from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from unbraid.common.errors import UnsuitedError
from unbraid.core.recipe import Recipe
from unbraid.core.selectors import ROLES as ROLES
from unbraid.core.selectors import Blocks as Blocks

Method = Callable[..., tuple[Recipe, ...]]
Check = Callable[[Mapping[str, Sequence[Image.Image]], Mapping[str, Sequence[Path]]], list[str]]


@dataclass(frozen=True)
class Output:
    """One LoRA file: the adapters in it, the role of the prompt to use it with, and whether learned gates are folded in
    (masks always are)."""

    adapters: tuple[str, ...]
    prompt: str
    gates: bool = True


@dataclass(frozen=True)
class Input:
    """One kind of files that a method starts from. Their role is the name by which the recipe refers to them."""

    role: str
    kind: Literal["picture", "pictures", "LoRA", "module"] = "picture"
    optional: bool = False  # missing pictures are drawn, with the LoRA of the role or by the base


@dataclass(frozen=True)
class Inputs:
    """All files that a method starts from, and the settings that depend on them or on each other."""

    files: tuple[Input, ...]
    set_by_verb: tuple[str, ...] = ()  # settings that the verb derives from its inputs; users cannot give them
    # The shortest run that changes every picture, for tests: settings that differ from those of `unbraid.runs.shortest`
    shortest: Mapping[str, Any] = field(default_factory=dict)
    check: Check = lambda images, files: []  # checks the opened pictures: raises UsageError, or returns warnings
    reads_blocks: bool = False  # whether the method treats the layers of content and of style differently
    # Setting → the largest value that fits the other settings; a default that is larger is lowered to it
    limits: Mapping[str, Callable[[Mapping[str, Any]], float]] = field(default_factory=dict)

    def of_kind(self, *kinds: str) -> tuple[Input, ...]:
        """The inputs of these kinds."""
        return tuple(one for one in self.files if one.kind in kinds)


def two(kind: Literal["LoRA", "module"]) -> tuple[Input, ...]:
    """Two LoRAs or modules, for content and style, and the pictures that each was trained on."""
    return (*(Input(role, kind) for role in ROLES), *(Input(role, "pictures", optional=True) for role in ROLES))


ONE_PICTURE = Inputs((Input("image"),))
TWO_LORAS = Inputs(two("LoRA"), set_by_verb=("roles",))


@dataclass(frozen=True)
class Publication:
    """Where a method is from, and the name to publish its results under."""

    title: str
    paper: str
    # Settings → the name to publish results under, for a method with settings that have names of their own
    known_as: Callable[[Mapping[str, Any]], str] | None = None


@dataclass(frozen=True)
class Entry:
    """A method. Its settings are the keyword-only arguments of `make`, whose docstring describes each as `name: text.`"""

    name: str
    verb: str  # the command that runs it
    make: Method
    # Role → template of its prompt, with {rare} and the words from the command line; a template whose words are not given
    # is left out. If there are no templates, the words themselves are the prompts.
    prompts: Mapping[str, str]
    outputs: Callable[[Mapping[str, Any]], dict[str, Output]]  # settings → file stem → output
    publication: Publication
    inputs: Inputs
    version: int = 1  # raise it when the same settings train other LoRAs: the benchmark then does them again

    @property
    def title(self) -> str:
        return self.publication.title

    @property
    def paper(self) -> str:
        return self.publication.paper

    def known_as(self, settings: Mapping[str, Any]) -> str:
        """The name to publish the results of a run with these settings under: by default that of the method."""
        return self.publication.known_as(settings) if self.publication.known_as else self.name


def split_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """A content LoRA and a style LoRA."""
    del settings
    return {role: Output((role,), role) for role in ROLES}


def zip_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """One file for each LoRA, or one file with both if `single` is set."""
    roles = tuple(settings["roles"])
    return {"merged": Output(roles, "both")} if settings["single"] else {role: Output((role,), role) for role in roles}


def known_blocks(blocks: Blocks, method: str) -> None:
    """Raise UnsuitedError if it is not known which blocks of the base control content, or style."""
    if unknown := [role for role in ROLES if not blocks.get(role)]:
        what = f"which blocks of this base control {' and '.join(unknown)} is not known"
        fix = (
            "Give --blocks (`unbraid probe-blocks` measures them), or use --method unziplora, or an SDXL or SD1.5 base."
        )
        raise UnsuitedError(what, method, fix)


def alone(blocks: Blocks, role: str) -> tuple[str, ...]:
    """The layers of a role for methods that train no others. A family's table may have fewer for them: B-LoRA's are a part of
    UnZipLoRA's."""
    return blocks.get(f"{role} alone") or blocks[role]
