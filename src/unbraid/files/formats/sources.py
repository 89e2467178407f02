"""Checks and metadata for a merge of several LoRA files: they must share a family and a spelling of names."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unbraid.common.errors import UsageError
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.recognise import name_in
from unbraid.files.formats.unets import unet_modules

UNETS: frozenset[Family] = frozenset(("sdxl", "sd15", "sd21"))
# metadata that a merged LoRA keeps if all its sources agree
_SHARED = (
    *(
        "modelspec.prediction_type",
        "modelspec.usage_hint",
        "modelspec.license",
        "modelspec.encoder_layer",
        "modelspec.resolution",
    ),
    *(
        "ss_sd_model_name",
        "ss_sd_model_hash",
        "ss_new_sd_model_hash",
        "ss_clip_skip",
        "ss_v2",
        "ss_vae_name",
        "ss_resolution",
    ),
    *("unbraid.base", "ss_base_model_version", "modelspec.architecture", "modelspec.implementation"),
)
_JOINED = ("modelspec.trigger_phrase", "modelspec.tags", "modelspec.author")


def common_family(files: Sequence[tuple[str, Family, Iterable[str]]]) -> Family:
    """The family of all `files`, each (path, family, names of modules). Errors: different families; an unknown family together with a
    known one, unless its names belong to that family; UNets together with transformers; names in two spellings."""
    known: list[Family] = list(dict.fromkeys(family for _, family, _ in files if family != "unknown"))
    if len(known) > 1:
        what = f"the LoRAs are for different base models: {', '.join(sorted(known))}"
        raise UsageError(what, "merge", "Merge LoRAs of one family.")
    sides = {side for _, _, names in files for name in names if (side := _side(name))}
    if len(sides) > 1:
        what = f"the LoRAs' names do not go together: {' and '.join(sorted(sides))}"
        raise UsageError(what, "merge", "Merge LoRAs of one model in one spelling.")
    if not known:
        return "unknown"
    sure = {name for _, family, names in files if family != "unknown" for name in names}
    for path, family, names in files:
        strange = next((name for name in names if not (name in sure or _of(name, known[0]))), None)
        if family == "unknown" and strange:
            what = f"its base is not known, and {known[0]} has no {strange[:60]}"
            raise UsageError(what, path, f"Merge it with LoRAs of its own base, not of {known[0]}.")
    return known[0]


def _of(name: str, family: Family) -> bool:
    if name.startswith("text_encoder"):
        return True
    if name.startswith("unet."):
        return family in UNETS and name.removeprefix("unet.") in unet_modules(family)
    return name_in(name, family) == name


def _side(name: str) -> str:
    """The prefix of a module's name, such as `unet.`; empty for text encoders, which all families have."""
    if name.startswith("text_encoder"):
        return ""
    known = name.partition(".")[0]
    if known in ("unet", "transformer", "diffusion_model"):
        return f"{known}."
    return "lora_unet_" if name.startswith("lora_unet_") else "no prefix"


def merged_metadata(sources: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The metadata of a merged LoRA: trigger words, tags, authors and tag counts of all sources; other keys on which the sources agree.
    Titles, hashes and training settings are left out."""
    merged: dict[str, str] = {}
    for key in _JOINED:
        found = dict.fromkeys(text.strip() for source in sources if (text := source.get(key, "")).strip())
        if found:
            merged[key] = ", ".join(found)
    for key in _SHARED:
        found = dict.fromkeys(source[key] for source in sources if source.get(key))
        if len(found) == 1:
            merged[key] = next(iter(found))
    counts: dict[str, Any] = {}
    for source in sources:
        counts |= json_object(source.get("ss_tag_frequency", ""))
    return merged | ({"ss_tag_frequency": json.dumps(counts)} if counts else {})


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is; empty if it is none."""
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
