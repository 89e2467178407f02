"""Parsing the LoRAs that `generate` takes: FILE:SCALE@FROM-TO."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from unbraid.common.errors import UsageError


def parsed_uses(loras: list[str], prompts: list[str], option: str = "--lora") -> list[Any]:
    """The LoRAs of the command line, each with its strength, its prompt and its steps. `option`: for the error."""
    from unbraid.sampling.uses import Use

    if prompts and len(prompts) != len(loras):
        fix = f"Give one per {option}, or none."
        raise UsageError(f"{len(prompts)} prompts for {len(loras)} LoRAs", option, fix)
    uses = []
    for i, text in enumerate(loras):
        whole, steps = _in_steps(text)
        name, scale = scaled(whole)
        uses.append(Use(Path(name), scale, prompts[i] if prompts else None, steps))
    return uses


def with_opponents(uses: list[Any], others: list[str]) -> list[Any]:
    """The uses, each with the LoRA that it is drawn against."""
    if others and len(others) != len(uses):
        what, fix = f"{len(others)} files for {len(uses)} LoRAs", "Give one per --lora, or none."
        raise UsageError(what, "--against", fix)
    parsed = [scaled(text) for text in others]
    both = zip(uses, parsed, strict=True) if parsed else ()
    return [replace(use, against=Path(name), contrast=weight) for use, (name, weight) in both] or uses


def _in_steps(text: str) -> tuple[str, tuple[float, float]]:
    """Parse NAME[:SCALE] or NAME[:SCALE]@FROM-TO. The name may contain @."""
    found = re.fullmatch(r"(.+)@([0-9.]+)-([0-9.]+)", text)
    try:
        return (found[1], (float(found[2]), float(found[3]))) if found else (text, (0.0, 1.0))
    except ValueError:  # two dots in a number
        return text, (0.0, 1.0)


def scaled(text: str) -> tuple[str, float]:
    """Parse NAME or NAME:SCALE. The name may contain colons."""
    name, colon, scale = text.rpartition(":")
    try:
        return (name, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0
