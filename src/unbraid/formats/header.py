"""What a LoRA file holds, from its header alone: names, shapes, dtypes, metadata. No torch, no weights read."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from unbraid.errors import UsageError
from unbraid.formats.blocks import Family
from unbraid.formats.kinds import KIND
from unbraid.formats.names import KINDS, canonical, split_key

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
MAX_KEYS = 200_000
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A safetensors file's header: key → shape, key → dtype name, and the metadata strings."""

    path: Path
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Catalogue:
    """The keys in order: canonical module → part → key; the keys that are not known; the kinds that are not plain LoRA."""

    modules: Mapping[str, Mapping[str, str]]
    raw: Mapping[str, str]  # canonical module → what the file calls it
    unknown: tuple[str, ...]
    kinds: Mapping[str, int]  # such as {"LoHa": 300}
    twice: tuple[str, ...]  # modules that the file names in two ways
    adapters: tuple[str, ...]  # PEFT adapter names, when there are several
    ignored: tuple[str, ...]  # embeddings bundled with the LoRA


@contextmanager
def opened(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """A safetensors handle; every way in which the file can be bad is a `UsageError`."""
    if path.suffix.lower() in PICKLES:
        fix = "Such files can run any code when they are opened. Get or make a .safetensors of it."
        raise UsageError("pickle files are not read", path, fix)
    if not path.is_file():
        raise UsageError(
            "there is no such file" if not path.exists() else "not a file", path, "Give a .safetensors file."
        )
    try:
        # pread: tensors of their own, so a file that shrinks meanwhile is an error and not a crash.
        with safe_open(path, framework=framework, backend="pread" if framework == "pt" else "mmap") as handle:
            yield handle
    except (SafetensorError, OSError, UnicodeError) as error:
        raise UsageError(f"not a readable safetensors file ({_short(error)})", path, _fix(path)) from error


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Errors: not there, a pickle, truncated, not safetensors."""
    with opened(path) as handle:
        keys = list(handle.keys())
        if len(keys) > MAX_KEYS:
            raise UsageError(f"{len(keys)} tensors are too many for a LoRA", path, "Is it one?")
        slices = {key: handle.get_slice(key) for key in keys}
        shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        return Header(path, shapes, {key: part.get_dtype() for key, part in slices.items()}, handle.metadata() or {})


def catalogue(header: Header, adapter: str | None = None) -> Catalogue:
    """Sort a header's keys by module and part; of a PEFT file with several adapters only `adapter`, if given.

    Nothing is refused here: `doctor` wants to see it all."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    raw: dict[str, str] = {}
    unknown, twice, ignored = [], [], []
    kinds: Counter[str] = Counter()
    adapters: dict[str, None] = {}
    for key in header.shapes:
        if key.startswith("bundle_emb."):
            ignored.append(key)
            continue
        cut = split_key(key)
        if cut and adapter and cut.adapter not in ("", adapter):
            continue
        found = cut and _place(cut.module, cut.part)
        if not cut or not found:
            unknown.append(key)
            continue
        module, part = found
        if part in KINDS or part in KIND:
            kinds[KIND.get(part, part)] += 1
        if cut.adapter:
            adapters[cut.adapter] = None
        if part in modules[module]:
            twice.append(module)
        modules[module][part] = key
        raw.setdefault(module, cut.module)
    several = tuple(adapters) if len(adapters) > 1 else ()
    _flux_t5(modules, raw)
    return Catalogue(modules, raw, tuple(unknown), kinds, tuple(dict.fromkeys(twice)), several, tuple(ignored))


def _place(module: str, part: str) -> tuple[str, str] | None:
    """Canonical module and part. XLabs' processors hold the image's and the text's half of one attention."""
    if part in ("down1", "up1", "down2", "up2"):
        stem, _, leaf = module.rpartition(".processor.")
        module, part = f"{stem}.{'img' if part[-1] == '1' else 'txt'}_attn.{leaf}", part[:-1]
    elif ".processor." in module and module.rpartition(".processor.")[0].rpartition(".")[0].endswith("single_blocks"):
        stem, _, leaf = module.rpartition(".processor.")
        module = f"{stem}.{ {'qkv': 'linear1', 'proj': 'linear2'}.get(leaf, leaf) }"
    name = canonical(module)
    return None if name is None else (name, part)


def _flux_t5(modules: dict[str, dict[str, str]], raw: dict[str, str]) -> None:
    """Flux's T5 is `te3` to kohya's tools and `text_encoder_2` to diffusers."""
    t5 = [name for name in modules if name.startswith("text_encoder_3.")]
    if t5 and family_of_names(modules) == "flux":
        for name in t5:
            renamed = name.replace("text_encoder_3.", "text_encoder_2.", 1)
            modules[renamed], raw[renamed] = modules.pop(name), raw.pop(name)


def family_of_names(modules: Mapping[str, object]) -> Family:
    """Flux or SD3 by their blocks' names; anything else is `unknown`."""
    paths = [name.partition(".")[2] for name in modules if name.startswith("transformer.")]
    if any(path.startswith(("single_transformer_blocks.", "single_blocks.", "double_blocks.")) for path in paths):
        return "flux"
    if any(path.startswith("joint_blocks.") or ".attn.add_q_proj" in path for path in paths):
        return "sd3"
    return "unknown"


def family_of(header: Header, found: Catalogue) -> Family:
    """The base model's family: by what only one family has, then by the metadata, then by what is likely."""
    modules = found.modules
    names = family_of_names(modules)
    if names != "unknown" or any(name.startswith("transformer.") for name in modules):
        return names
    for name, parts in modules.items():
        if name.endswith(("attn2.to_k", "attn2.to_v")) and "down" in parts:
            width = header.shapes[parts["down"]][-1:]
            if width in ((2048,), (768,)):
                return "sdxl" if width == (2048,) else "sd15"
    if any(".up_blocks.3." in name or ".down_blocks.3." in name for name in modules):
        return "sd15"
    return _told(header.metadata) or _likely(found)


def _told(metadata: Mapping[str, str]) -> Family | None:
    base = metadata.get("ss_base_model_version", "").lower()
    architecture = metadata.get("modelspec.architecture", "").lower()
    if base.startswith("sdxl") or architecture.startswith("stable-diffusion-xl"):
        return "sdxl"
    if base.startswith(("sd_v1", "sd_1")) or architecture.startswith("stable-diffusion-v1"):
        return "sd15"
    return None


def _likely(found: Catalogue) -> Family:
    if any(name.startswith("text_encoder_2.") for name in found.modules):
        return "sdxl"
    if any(re.search(r"(input|output)_blocks|middle_block", raw) for raw in found.raw.values()):
        return "sdxl"  # nobody writes LDM names for SD1.5
    if any(re.search(r"\.transformer_blocks\.[1-9]", name) for name in found.modules):
        return "sdxl"
    if any(raw.startswith("lora_te_") for raw in found.raw.values()):
        return "sd15"
    return "unknown"


def adapter_metadata(header: Header) -> dict[str, Any]:
    """PEFT's settings as diffusers stores them: `unet.r`, `unet.lora_alpha`, `unet.rank_pattern`, …"""
    text = header.metadata.get("lora_adapter_metadata")
    beside = header.path.with_name("adapter_config.json")  # a PEFT folder
    try:
        if text is None and header.path.name == "adapter_model.safetensors" and beside.is_file():
            text = beside.read_text()
        found = json.loads(text) if text else {}
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError("the adapter's settings are not JSON", header.path, "Save the LoRA again.") from error
    if not isinstance(found, dict):
        raise UsageError("the adapter's settings are not a JSON object", header.path, "Save the LoRA again.")
    return found


def _short(error: BaseException) -> str:
    return (
        str(error).removeprefix("Error while deserializing header: ").splitlines()[0][:100] if str(error) else "empty"
    )


def _fix(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return "Check that you may read it."
    # a safetensors file begins with its header's length, eight bytes of which the last ones are 0
    if start[:2] == b"PK" or (start[:1] == b"\x80" and (start[2:3] == b"\x95" or any(start[4:]))):
        return "It is a pickle under another name, which can run any code: get a real .safetensors."
    return "The download may be incomplete: get it again."
