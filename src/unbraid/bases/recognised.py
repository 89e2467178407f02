"""What a diffusers folder or hub repository holds, from the name of its pipeline class alone. Nothing else is downloaded."""

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from unbraid.bases.families import FAMILIES
from unbraid.bases.families.family import Preset
from unbraid.bases.transformer_file import transformer_file
from unbraid.common.errors import UsageError

TAKEN = "unbraid takes SDXL, SD1.5, SD2.1, Flux.1, SD3.5 and Z-Image."
REFINER = "StableDiffusionXLImg2ImgPipeline"
OTHERS: Mapping[str, str] = {  # how the name of a pipeline class begins → what it is; the first that fits counts
    "Flux2Klein": "FLUX.2 klein",
    "Flux2": "FLUX.2",
    "Flux3": "FLUX.3",
    "FluxKontext": "Flux Kontext, which edits pictures",
    "FluxFill": "Flux Fill, which paints into pictures",
    "FluxControl": "Flux with a control picture",
    "QwenImage": "Qwen-Image",
    "ZImageOmni": "Z-Image Omni",
    "Chroma": "Chroma",
    "HiDream": "HiDream",
    "Anima": "Anima",
    "Cosmos": "Cosmos",
    "Krea2": "Krea 2",
    "Ideogram": "Ideogram",
    "Lumina": "Lumina",
    "Sana": "Sana",
    "PixArt": "PixArt",
    "Kolors": "Kolors",
    "AuraFlow": "AuraFlow",
    "StableCascade": "Stable Cascade",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanImage": "HunyuanImage",
    "HunyuanDiT": "HunyuanDiT",
    "Wan": "Wan",
    "LTX": "LTX",
}


LONG, AGAIN = 5.0, 60.0  # seconds: who waited that long in vain does not ask again before this time
_ASKED: dict[str, tuple[Mapping[str, Any], float]] = {}  # hub id → what it answered, and when


def pipeline_class(base: str) -> str:
    """The name of the pipeline class of a folder or a hub id; empty if it cannot be found out, or if `base` is a file."""
    return str(_index(base).get("_class_name") or "")


def left_out(base: str) -> tuple[str, ...]:
    """The text encoders and tokenizers that a folder or a hub id says it does not have, such as SD3.5's T5."""
    texts = [(name, part) for name, part in _index(base).items() if name.startswith(("text_encoder", "tokenizer"))]
    return tuple(name for name, part in texts if part and not any(part))


def components(base: str) -> Mapping[str, Any]:
    """The parts of the pipeline of a folder or a hub id: name → library and class. Empty if it cannot be found out."""
    return {name: part for name, part in _index(base).items() if isinstance(part, list | tuple) and any(part)}


def _index(base: str) -> Mapping[str, Any]:
    """The content of `model_index.json`; empty if there is none, or if `base` is a file. That of a hub id is asked for once,
    and again where it was not found; but without a network, where an answer takes half a minute, only after a minute."""
    if base == "icons" or Path(base).is_file():
        return {}
    if Path(base).is_dir():
        return _read_index(base)
    index, when = _ASKED.get(base, ({}, -AGAIN))
    if not index and (begin := time.monotonic()) - when >= AGAIN:
        index = _read_index(base)
        end = time.monotonic()
        if index or end - begin > LONG:
            _ASKED[base] = index, end
    return index


def _read_index(base: str) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers passes arguments that the hub's library has deprecated
            index: Any = DiffusionPipeline.load_config(base)
    except (OSError, ValueError):
        return {}
    return index


def check_supported(name: str, base: str) -> None:
    """Raise UsageError if a pipeline class of this name cannot be a base, before anything is loaded. `base`: for the
    error. An empty name is accepted."""
    if not name or name in {family.pipeline.__name__ for family in FAMILIES}:
        return
    if name == REFINER:
        fix = "Give the base model: the refiner only finishes pictures, and LoRAs are not trained on it."
        raise UsageError("this is SDXL's refiner, or an SDXL model for image to image", base, fix)
    if kind := next((kind for begin, kind in OTHERS.items() if name.startswith(begin)), ""):
        raise UsageError(f"this is {kind}, which is not supported", base, TAKEN)
    if "Inpaint" in name or "Img2Img" in name:
        fix = "Give the text-to-image model that it was made from."
        raise UsageError(f"{name} is no text-to-image model", base, fix)
    raise UsageError(f"models of the kind {name} are not supported", base, TAKEN)


def family_preset(base: str, method: str) -> Preset:
    """What the family of a base changes in a method. Nothing, if the family is not known before the base is loaded."""
    name, kind = pipeline_class(base), kind_of_file(base)
    presets = next((one.presets for one in FAMILIES if name == one.pipeline.__name__ or kind == one.name), {})
    return presets.get(method, Preset())


def default_parts(kind: str) -> str:
    """The folder or hub id with what single files of transformers lack, for a file of this kind: the environment variable
    UNBRAID_PARTS. Empty if the file is of no kind of transformer."""
    return os.environ.get("UNBRAID_PARTS", "") if kind else ""


def kind_of_file(base: str) -> str:
    """The kind of transformer that a single file has; empty if it is none."""
    if not Path(base).is_file():
        return ""
    try:
        found = transformer_file(Path(base))
    except UsageError:  # is raised again when the base is loaded
        return ""
    return found.kind if found else ""
