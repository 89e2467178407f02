"""LoRA files, and everything that needs only files: reading and writing all dialects, merging, resizing, converting, editing,
baking, extracting, and reports on files. Nothing here loads a base model, trains or draws."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unbraid.files.lora_file import LoraFile, read, write

__all__ = ["LoraFile", "read", "write"]


def __getattr__(name: str) -> Any:
    """Import `lora_file` at the first use, so that code which only reads headers does not import torch."""
    if name not in __all__:
        raise AttributeError(f"module 'unbraid.files' has no attribute {name!r}")
    from unbraid.files import lora_file

    return getattr(lora_file, name)
