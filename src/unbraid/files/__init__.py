"""LoRA files, and everything that needs only files: reading and writing all dialects, merging, resizing, converting, editing,
baking, extracting, and what is said about a file. No base model is loaded here, nothing is trained or drawn."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unbraid.files.lora_file import LoraFile, read, write

__all__ = ["LoraFile", "read", "write"]


def __getattr__(name: str) -> Any:
    """Loaded when they are first used: what looks at headers alone needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'unbraid.files' has no attribute {name!r}")
    from unbraid.files import lora_file

    return getattr(lora_file, name)
