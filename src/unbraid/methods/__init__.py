"""The methods. A new one is a file here, a line in METHODS, a test and a row in the docs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unbraid.methods.dreambooth import dreambooth
from unbraid.methods.unziplora import ROLES, unziplora
from unbraid.train import Recipe

Method = Callable[..., tuple[Recipe, ...]]


@dataclass(frozen=True)
class Output:
    """One LoRA file: the adapter in it, the role of the prompt that it goes with, and whether its learned gates
    are folded in (its mask always is)."""

    adapter: str
    prompt: str
    gates: bool = True


@dataclass(frozen=True)
class Entry:
    """A method as the command line sees it. Its settings are the keyword-only arguments of `make`."""

    verb: str
    make: Method
    prompts: Mapping[str, str]  # role → template over {subject}, {style}, {rare}
    outputs: Callable[[Mapping[str, Any]], dict[str, Output]]  # settings → file stem → output
    paper: str


SPLIT_PROMPTS = {
    "both": "a {rare} {subject} in {style} style",
    "content": "a {rare} {subject}",
    "style": "a {subject} in {style} style",
}


def split_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """The published code applies its gates in joint use only, so it needs two more files for that."""
    if settings.get("compat") != "official":
        return {role: Output(role, role) for role in ROLES}
    alone = {role: Output(role, role, gates=False) for role in ROLES}
    return alone | {f"{role}_joint": Output(role, role) for role in ROLES}


METHODS: dict[str, Entry] = {
    "unziplora": Entry("split", unziplora, SPLIT_PROMPTS, split_outputs, "2412.04465"),
    "dreambooth": Entry(
        "learn", dreambooth, {"both": "{prompt}"}, lambda settings: {"lora": Output("lora", "both")}, "2208.12242"
    ),
}
