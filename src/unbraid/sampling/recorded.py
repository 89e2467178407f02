"""What a LoRA file records about the words that it was trained with."""

from collections.abc import Mapping
from pathlib import Path

from unbraid.common.errors import UsageError

PROMPTS = ("unbraid.prompt", "modelspec.trigger_phrase")
STYLE = "unbraid.style"


def own_prompt(path: Path, metadata: Mapping[str, str]) -> str:
    """The prompt that a LoRA was trained with. UsageError if none is recorded."""
    for key in PROMPTS:
        if metadata.get(key):
            return metadata[key]
    raise UsageError("records no prompt of its own", path, "Say what it was trained with: see --help for the option.")


def style_words(path: Path, metadata: Mapping[str, str]) -> str:
    """The name of a style LoRA's style. UsageError if none is recorded."""
    if metadata.get(STYLE):
        return metadata[STYLE]
    raise UsageError("does not say what its style is called", path, "Say it: --style-prompt WORDS.")


def trained_words(metadata: Mapping[str, str]) -> str:
    """All recorded words that a LoRA was trained with; empty if none are."""
    return " ".join(metadata[key] for key in (*PROMPTS, STYLE) if metadata.get(key))
