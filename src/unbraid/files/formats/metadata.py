"""The metadata of LoRA files: kohya's ss_* keys, ModelSpec, PEFT's settings. Every value is a string."""

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.common.atomic import atomic, sha256
from unbraid.common.errors import UsageError
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.families import DESIGNS
from unbraid.files.formats.recognise import named_family

if TYPE_CHECKING:
    from PIL.Image import Image

_STABILITY = "https://github.com/Stability-AI/generative-models"
# family → (kohya's name of the base, ModelSpec's architecture, ModelSpec's implementation)
LABELS: dict[Family, tuple[str, str, str]] = {
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", _STABILITY),
    "sd15": ("sd_v1", "stable-diffusion-v1/lora", "diffusers"),
    "sd21": ("sd_v2", "stable-diffusion-v2-512/lora", "diffusers"),
    "flux": ("flux1", "flux-1-dev/lora", "https://github.com/black-forest-labs/flux"),
    "sd3": ("sd3", "stable-diffusion-3-m/lora", _STABILITY),
    **{
        family: (design.base, f"{design.architecture}/lora", "diffusers")
        for family, design in DESIGNS.items()
        if family not in ("flux", "sd3")
    },
}
PREFIX = "lora_adapter_metadata"
UNKNOWN_HASH = "0" * 64  # placeholder; `stamp` replaces it after the tensors are written


def kohya_metadata(given: Mapping[str, str], ranks: Mapping[str, int], alpha: float) -> dict[str, str]:
    """The caller's metadata with the keys that tools read. PEFT's settings are removed, because diffusers refuses files with both."""
    kept = {key: value for key, value in given.items() if key not in (PREFIX, "format")}
    network = {"ss_network_module": "networks.lora", "ss_network_dim": _rank(ranks), "ss_network_alpha": f"{alpha:g}"}
    hashes = {"sshs_model_hash": UNKNOWN_HASH, "modelspec.hash_sha256": f"0x{UNKNOWN_HASH}"}
    return {**kept, **network, **hashes}


def peft_metadata(given: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, str]:
    """The caller's metadata with PEFT's settings as diffusers stores them, alpha = r for every module."""
    settings: dict[str, Any] = {}
    by_component: dict[str, dict[str, int]] = {}
    for name, rank in ranks.items():
        component, _, path = name.partition(".")
        # PEFT compares the ends of names, so the short name works both before and since transformers 5, which removed `text_model`
        by_component.setdefault(component, {})[path.removeprefix("text_model.")] = rank
    for component, found in by_component.items():
        common = Counter(found.values()).most_common(1)[0][0]
        named = {path for path, rank in found.items() if rank != common}
        ends = {path for path in found if any(path.endswith(f".{name}") for name in named if len(name) < len(path))}
        # PEFT uses the first pattern that a name ends with, so the longest come first
        other = {path: found[path] for path in sorted(named | ends, key=lambda path: (-len(path), path))}
        mine = {"r": common, "lora_alpha": common, "target_modules": sorted(found), "rank_pattern": other}
        settings |= {f"{component}.{key}": value for key, value in (mine | {"alpha_pattern": other}).items()}
    kept = {key: value for key, value in given.items() if not key.startswith("ss_network_")}
    return {**kept, "format": "pt", PREFIX: json.dumps(settings)}


def data_hash(path: Path) -> str:
    """SHA-256 of the tensors' bytes without the header, by which webui identifies LoRAs."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return sha256(path, start=8 + header)


def stamp(path: Path, digest: str) -> None:
    """Replace the placeholder for the hash in the header."""
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8)
        file.write(header.replace(UNKNOWN_HASH.encode(), digest.encode()))


def modelspec(family: Family) -> dict[str, str]:
    """The family in kohya's keys and in those of ModelSpec 1.0.1; empty for families without a label."""
    if family not in LABELS:
        return {}
    base, architecture, implementation = LABELS[family]
    return {
        "ss_base_model_version": base,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": "LoRA",
    } | ({"ss_v2": "True"} if family == "sd21" else {})


def labelled(given: Mapping[str, str], family: Family, other: bool = False) -> dict[str, str]:
    """The caller's metadata, completed with the family's labels. If it names another family, these replace it. `other`: the LoRA is for
    a different base of the same design, which tools must not mistake for the published one."""
    mine = modelspec(family)
    if mine and (other or named_family(given) not in (None, family)):
        given = {key: value for key, value in given.items() if key not in mine or key == "modelspec.title"}
    if mine and other:
        mine = {"ss_base_model_version": f"{family}-other", "modelspec.title": "LoRA"}
    return {**mine, **given}


def _rank(ranks: Mapping[str, int]) -> str:
    found = set(ranks.values())
    return str(found.pop()) if len(found) == 1 else "Dynamic"


def card(
    title: str = "",
    trigger: str = "",
    tags: str = "",
    description: str = "",
    author: str = "",
    thumbnail: "Path | Image | None" = None,
) -> dict[str, str]:
    """ModelSpec fields for `write(metadata=…)`; empty ones are left out. `thumbnail`: any picture, reduced to 256×256."""
    fields = {"title": title, "trigger_phrase": trigger, "tags": tags, "description": description, "author": author}
    card = {f"modelspec.{key}": value for key, value in fields.items() if value}
    if title:
        card["ss_output_name"] = title  # the alias in A1111 and Forge
    return card | ({"modelspec.thumbnail": data_uri(thumbnail)} if thumbnail else {})


def data_uri(picture: "Path | Image") -> str:
    """A picture as a thumbnail for ModelSpec: a data URI of a JPEG, at most 256×256 pixels. Errors: not a picture."""
    from unbraid.images.opening import open_image  # imported here, because Pillow is rarely needed

    small = open_image(picture, enough=4 * 256**2) if isinstance(picture, Path) else picture.convert("RGB")
    small.thumbnail((256, 256))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def write_sidecar(lora: Path, metadata: Mapping[str, str], weight: float = 1.0) -> Path:
    """Write `NAME.json` beside the LoRA, with the keys that A1111, Forge and InvokeAI read, and `NAME.jpg` if it has a thumbnail.
    Neither is ever half-written. Errors: a thumbnail that is not base64, a folder that cannot be written."""
    version = {
        "stable-diffusion-xl": "SDXL",
        "stable-diffusion-v1": "SD1",
        "stable-diffusion-v2": "SD2",
        "flux": "Flux",
    }
    architecture = metadata.get("modelspec.architecture", "")
    fields = {
        "description": metadata.get("modelspec.description", ""),
        "sd version": next((name for start, name in version.items() if architecture.startswith(start)), "Unknown"),
        "activation text": metadata.get("modelspec.trigger_phrase", ""),
        "preferred weight": weight,
    }
    path, files = lora.with_suffix(".json"), {lora.with_suffix(".json"): (json.dumps(fields, indent=2) + "\n").encode()}
    start, _, data = metadata.get("modelspec.thumbnail", "").partition("base64,")
    try:
        if start.startswith("data:image/jpeg"):
            files[lora.with_suffix(".jpg")] = base64.b64decode(data)
    except ValueError as error:
        raise UsageError("its thumbnail is damaged", lora, "Give it another one: unbraid edit --thumbnail.") from error
    for name, content in files.items():
        with atomic(name) as part:
            part.write_bytes(content)
    return path
