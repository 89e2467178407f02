"""The methods. A new one is a file here, a line in METHODS, a test and a row in the docs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unbraid.methods.b4m import break_, make
from unbraid.methods.blora import blora
from unbraid.methods.dreambooth import dreambooth
from unbraid.methods.nplora import nplora
from unbraid.methods.pair import check_pairs, pair
from unbraid.methods.slider import slider
from unbraid.methods.unziplora import ROLES, unziplora
from unbraid.methods.ziplora import ziplora
from unbraid.recipe import Recipe

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
    """A method as the command line sees it. Its settings are the keyword-only arguments of `make`."""

    verb: str
    make: Method
    prompts: Mapping[
        str, str
    ]  # role → template over the words given, {rare}; empty: the words are the prompts. Templates without their words are left out
    outputs: Callable[[Mapping[str, Any]], dict[str, Output]]  # settings → file stem → output
    paper: str
    check: Check = lambda images, files: []  # of the opened pictures by role: raises UsageError, or returns warnings
    version: int = 1  # raised when the same settings train other LoRAs: results of the benchmark depend on it


SPLIT_PROMPTS = {
    "both": "a {rare} {subject} in {style} style",
    "content": "a {rare} {subject}",
    "style": "a {subject} in {style} style",
}


PAIR_PROMPTS = {
    "both": "a {rare} {subject} in {style} style",
    "content": "a {rare} {subject}",
    "style": "a {rare} {subject} in {style} style",
}


def split_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """The published code applies its gates in joint use only, so it needs two more files for that."""
    if settings.get("compat") != "official":
        return {role: Output((role,), role) for role in ROLES}
    alone = {role: Output((role,), role, gates=False) for role in ROLES}
    return alone | {f"{role}_joint": Output((role,), role) for role in ROLES}


def zip_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    roles = tuple(settings["roles"])
    return {"merged": Output(roles, "both")} if settings["single"] else {role: Output((role,), role) for role in roles}


def pair_outputs(settings: Mapping[str, Any]) -> dict[str, Output]:
    """Several pairs: the content adapters, one for each, are of no use afterwards."""
    content = {"content": Output(("content",), "content")} if settings["joint"] and settings["pairs"] == 1 else {}
    return {"style": Output(("style",), "style"), **content}


METHODS: dict[str, Entry] = {
    "unziplora": Entry("split", unziplora, SPLIT_PROMPTS, split_outputs, "arXiv 2412.04465"),
    "ziplora": Entry("zip", ziplora, {}, zip_outputs, "arXiv 2311.13600"),
    "np-lora": Entry("zip", nplora, {}, zip_outputs, "arXiv 2511.11051"),
    "pair": Entry("pair", pair, PAIR_PROMPTS, pair_outputs, "arXiv 2405.01536", check_pairs),
    "slider": Entry(
        "pair",
        slider,
        {"both": "a {rare} {subject}", "content": "a {rare} {subject}"},
        lambda settings: {"style": Output(("style",), "content")},
        "arXiv 2311.12092",
        check_pairs,
    ),
    "blora": Entry(
        "split",
        blora,
        {"both": "a {rare}"},
        lambda settings: {role: Output((role,), "both") for role in ROLES},
        "arXiv 2403.14572",
    ),
    "break": Entry(
        "break",
        break_,
        {"both": "{prompt}"},
        lambda settings: {"module": Output(("module",), "both")},
        "doi 10.1145/3728461",
    ),
    "make": Entry("make", make, {}, lambda settings: {"merged": Output(("merged",), "both")}, "doi 10.1145/3728461"),
    "dreambooth": Entry(
        "learn",
        dreambooth,
        {"both": "{prompt}", "prior": "{class_prompt}"},
        lambda settings: {"lora": Output(("lora",), "both")},
        "arXiv 2208.12242",
    ),
}
