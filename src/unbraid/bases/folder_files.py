"""Whether the weights of a diffusers folder are all there, from the headers of their files. The libraries that load them tell of a
damaged file in many ways, and fill what a text encoder lacks with random numbers."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from unbraid.common.errors import UsageError
from unbraid.files.formats.header import Shape, read_header

STEMS = ("diffusion_pytorch_model", "model")  # names of weights: diffusers', transformers'
INDEX = ".safetensors.index.json"  # of weights in several files, which are called shards
AGAIN = "The download is incomplete or damaged: get it again."
Shapes = Mapping[str, Shape]


def check_folder(folder: Path, parts: Iterable[str]) -> dict[str, Shapes]:
    """The names and shapes of the weights of these parts of a folder, which are its sub-folders. Parts that are no models are left
    out. Raises UsageError for a file that is missing, cannot be read or lacks a weight."""
    found = {part: _weights(folder / part) for part in parts}
    return {part: shapes for part, shapes in found.items() if shapes}


def check_filled(pipe: Any, folder: Path, found: Mapping[str, Shapes]) -> None:
    """Raise UsageError if a loaded model has weights that its files do not have. Only shapes are compared, because the libraries
    rename old names. Models with quantised weights have others."""
    for part, shapes in found.items():
        model = pipe.components.get(part)
        if not isinstance(model, nn.Module) or getattr(model, "quantization_method", None):
            continue
        own = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        lacking = Counter(own.values()) - Counter(shapes.values())
        if lacking:
            unknown = (name for name, shape in own.items() if shape in lacking and not _is_in(name, shapes))
            what = f"{part} lacks {lacking.total()} weights, such as {next(unknown, f'one of {next(iter(lacking))}')}"
            raise UsageError(what, folder / part, AGAIN)


def _is_in(name: str, shapes: Shapes) -> bool:
    return any(f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}") for key in shapes)


def _weights(folder: Path) -> Shapes:
    for stem in STEMS:
        if (file := folder / f"{stem}.safetensors").is_file():
            return read_header(file).shapes
        if (index := folder / f"{stem}{INDEX}").is_file():
            return _sharded(index)
    if (folder / "config.json").is_file():
        fix = "Get the missing files, or give a complete diffusers folder with .safetensors weights."
        raise UsageError("there are no weights in .safetensors here", folder, fix)
    return {}


def _sharded(index: Path) -> Shapes:
    try:
        places: dict[str, str] = dict(json.loads(index.read_text("utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError("is no readable index of weights", index, AGAIN) from error
    shapes = dict[str, Shape]()
    for name in sorted(set(map(str, places.values()))):
        shard = index.with_name(name)
        if not shard.is_file():
            raise UsageError("this part of the weights is missing", shard, AGAIN)
        there = read_header(shard).shapes
        if lacking := sorted(key for key, place in places.items() if place == name and key not in there):
            raise UsageError(f"it lacks {lacking[0]}", shard, AGAIN)
        shapes |= there
    return shapes
