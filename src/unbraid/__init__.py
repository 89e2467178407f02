"""unbraid: take an image apart into a content LoRA and a style LoRA, and put LoRAs together again."""

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import advises on torchvision, which is not used

if TYPE_CHECKING:
    from unbraid.api import generate, learn, pair, split, zip

__all__ = ["generate", "learn", "pair", "split", "zip"]


def __getattr__(name: str) -> Any:
    """The verbs, loaded when they are first used: the file tools need no diffusers."""
    if name in __all__:
        from unbraid import api

        return getattr(api, name)
    raise AttributeError(f"module 'unbraid' has no attribute {name!r}")
