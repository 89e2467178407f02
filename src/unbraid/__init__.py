"""unbraid: take an image apart into a content LoRA and a style LoRA, and put LoRAs together again."""

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import advises on torchvision, which is not used

if TYPE_CHECKING:
    from unbraid.api import generate, learn, pair, split, zip
    from unbraid.modules import break_module, make

__all__ = ["break_module", "generate", "learn", "make", "pair", "split", "zip"]


def __getattr__(name: str) -> Any:
    """The verbs, loaded when they are first used: the file tools need no diffusers."""
    if name not in __all__:
        raise AttributeError(f"module 'unbraid' has no attribute {name!r}")
    from unbraid import api, modules

    return getattr(modules if name in ("break_module", "make") else api, name)
