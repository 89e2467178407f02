"""Reading a LoRA file's header: names, shapes, dtypes, metadata. No torch; weights are not read."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from unbraid.common.contents import PICTURE, TEXT, contents
from unbraid.common.errors import UsageError, first_line
from unbraid.common.interrupts import interrupts_kept
from unbraid.files.formats.gate import MAX_KEYS, check, check_module, check_size
from unbraid.files.formats.kinds import KIND, sizes
from unbraid.files.formats.names import KINDS, Key, split_key
from unbraid.files.formats.recognise import Verdict, both_ways, name_in, recognise

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
OTHERS = {  # kind of another file, such as an argument in the wrong place → how to mend it
    PICTURE: "Give a .safetensors file.",
    TEXT: "Give a .safetensors file; if it should be one, get it again: a page or a pointer came in its place.",
}
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
    """The keys of a file, sorted. `modules`: canonical name → part → key. `kinds`: kind of tensor other than plain LoRA → number."""

    modules: Mapping[str, Mapping[str, str]]
    raw: Mapping[str, str]  # canonical name → the file's name
    unknown: tuple[str, ...]  # keys that belong to no LoRA
    kinds: Mapping[str, int]  # such as {"LoHa": 300}
    twice: tuple[str, ...]  # modules that the file names in two ways
    adapters: tuple[str, ...]  # PEFT adapter names, when there are several
    ignored: tuple[str, ...]  # embeddings bundled with the LoRA
    kept: tuple[str, ...]  # modules that are in no table, under the file's names
    verdict: Verdict


@contextmanager
def opened(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """A safetensors handle. Whatever is wrong with the file is raised as `UsageError`."""
    if path.suffix.lower() in PICKLES:
        fix = "Such files can run any code when they are opened. Get or make a .safetensors of it."
        raise UsageError("pickle files are not read", path, fix)
    if not path.is_file():
        raise _no_file(path)
    try:
        check_size(path)
        # pread copies tensors, so that a file which shrinks while it is read gives an error, not a crash
        backend = "pread" if framework == "pt" else "mmap"
        with interrupts_kept(), safe_open(path, framework=framework, backend=backend) as handle:
            yield handle
    except (SafetensorError, OSError, UnicodeError) as error:
        known = contents(path)
        reason = f"it is {known}" if known in OTHERS else _short(error)
        raise UsageError(
            f"not a readable safetensors file ({reason})", path, OTHERS.get(known) or _fix(path)
        ) from error


def _no_file(path: Path) -> UsageError:
    """The error for a path that is no file: a folder that may hold LoRAs, a strength that is no number, or nothing."""
    inside = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if inside:
        kind = "a run" if (path / "run.toml").exists() else "a folder"
        return UsageError(
            f"is {kind}, not a file", path, f"Give a file in it: {' or '.join(one.name for one in inside[:4])}."
        )
    name, colon, strength = path.name.rpartition(":")
    if colon and path.with_name(name).is_file():
        return UsageError(f"{strength!r} is not a strength", path.with_name(name), f"Give a number, as in {name}:0.8.")
    return UsageError("not a file" if path.exists() else "there is no such file", path, "Give a .safetensors file.")


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Errors: the file is missing, a pickle, truncated, or not safetensors."""
    with opened(path) as handle:
        keys = list(handle.keys())
        if len(keys) > MAX_KEYS:
            raise UsageError(f"{len(keys)} tensors are too many for a LoRA", path, "Is it one?")
        slices = {key: handle.get_slice(key) for key in keys}
        shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        header = Header(path, shapes, {key: part.get_dtype() for key, part in slices.items()}, handle.metadata() or {})
    check(path, header.shapes)
    return header


def catalogue(header: Header, adapter: str | None = None) -> Catalogue:
    """Sort a header's keys by module and part. `adapter`: the only one to use if a PEFT file has several.

    Nothing is refused here, because `doctor` reports on any file."""
    cuts: dict[str, Key] = {}
    unknown, ignored = [], []
    for key in header.shapes:
        cut = split_key(key)
        if key.startswith("bundle_emb."):
            ignored.append(key)
        elif not cut:
            unknown.append(key)
        elif not adapter or cut.adapter in ("", adapter):
            cuts[key] = _place(cut)
    verdict = recognise(_factors(header, cuts), header.metadata)
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    raw: dict[str, str] = {}
    kept, twice = [], []
    for key, cut in cuts.items():
        name = name_in(cut.module, verdict.family)
        if name is None:
            name = cut.module
            kept += [] if name in raw else [name]
        part = key[len(cut.module) + 1 :] if cut.part in KINDS else cut.part
        if part in modules[name] or raw.setdefault(name, cut.module) != cut.module:
            twice.append(name)
        modules[name][part] = key
    twice += both_ways(modules, verdict.family)
    adapters = tuple(dict.fromkeys(cut.adapter for cut in cuts.values() if cut.adapter))
    kinds = Counter(kind for key, cut in cuts.items() if (kind := _kind(cut.part, header.shapes[key])))
    if verdict.family in ("flux", "chroma"):
        _t5(modules, raw)
    return Catalogue(
        modules,
        raw,
        tuple(unknown),
        kinds,
        tuple(dict.fromkeys(twice)),
        adapters if len(adapters) > 1 else (),
        tuple(ignored),
        tuple(kept),
        verdict,
    )


def _kind(part: str, shape: Shape) -> str:
    """The kind of a tensor that is not part of a plain LoRA, else "". A `diff` with one dimension is the change of a norm."""
    if part == "diff" and len(shape) == 1:
        part = "w_norm"
    return part if part in KINDS else KIND.get(part, "")


def _factors(header: Header, cuts: Mapping[str, Key]) -> dict[str, tuple[Shape, Shape]]:
    """The file's name of a module → the shapes of down and up. For other kinds, those of an equivalent LoRA of rank 1; empty if unknown."""
    modules: dict[str, dict[str, Shape]] = {}
    for key, cut in cuts.items():
        modules.setdefault(cut.module, {})[cut.part] = header.shapes[key]
    out: dict[str, tuple[Shape, Shape]] = {}
    for module, parts in modules.items():
        size = sizes(parts)
        out[module] = ((1, size[1]), (size[0], 1)) if size else (parts.get("down", ()), parts.get("up", ()))
    return out


def _place(cut: Key) -> Key:
    """Translate XLabs' names: its attention processors hold the layers of image and text, which are modules of their own elsewhere."""
    module, part = cut.module, cut.part
    stem, found, leaf = module.rpartition(".processor.")
    if part in ("down1", "up1", "down2", "up2"):
        return replace(cut, module=f"{stem}.{'img' if part[-1] == '1' else 'txt'}_attn.{leaf}", part=part[:-1])
    if found and stem.rpartition(".")[0].endswith("single_blocks"):
        return replace(cut, module=f"{stem}.{ {'qkv': 'linear1', 'proj': 'linear2'}.get(leaf, leaf) }")
    return cut


def _t5(modules: dict[str, dict[str, str]], raw: dict[str, str]) -> None:
    """Rename Flux's T5, which kohya's tools number 3 (`te3`) and diffusers calls `text_encoder_2`."""
    for name in [name for name in modules if name.startswith("text_encoder_3.")]:
        renamed = name.replace("text_encoder_3.", "text_encoder_2.", 1)
        modules[renamed], raw[renamed] = modules.pop(name), raw.pop(name)


def check_readable(header: Header, found: Catalogue) -> None:
    """Raise UsageError for files that cannot be read as a LoRA: several adapters, unsupported kinds, unknown keys, modules twice, none."""
    where = header.path
    if found.adapters:
        names = ", ".join(found.adapters[:5])
        raise UsageError(f"the file holds several adapters: {names}", where, "Say which one to read.")
    if strange := {kind: n for kind, n in found.kinds.items() if kind in KINDS}:
        kinds = ", ".join(f"{kind} ({n} tensors)" for kind, n in strange.items())
        fix = "LoRA, LoCon, LoHa, LoKr, DoRA and full changes are read; train or export it as one of them."
        raise UsageError(f"not a LoRA that is read: {kinds}", where, fix)
    if found.unknown:
        what = f"{len(found.unknown)} tensors are no part of a LoRA, such as {found.unknown[0][:80]!r}"
        raise UsageError(what, where, "Give a LoRA file.")
    if found.twice:
        what = f"{found.verdict.family}: {len(found.twice)} modules twice (in two names, or fused and split): {found.twice[0]}"
        raise UsageError(what, where, "Save it again, each module once.")
    if not found.modules:
        raise UsageError("there is no LoRA in it", where, "Give a LoRA file.")


def adapter_metadata(header: Header) -> dict[str, Any]:
    """PEFT's settings: `unet.r`, `unet.lora_alpha`, `unet.rank_pattern`, … from the metadata, or from adapter_config.json beside a PEFT
    file. Empty if there are none."""
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
    return first_line(error).removeprefix("Error while deserializing header: ")[:100]


def _fix(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return "Check that you may read it."
    # a safetensors file starts with the length of its header in eight bytes, of which the last ones are 0
    if start[:2] == b"PK" or (start[:1] == b"\x80" and (start[2:3] == b"\x95" or any(start[4:]))):
        return "It is a pickle under another name, which can run any code: get a real .safetensors."
    return "The download may be incomplete: get it again."


def consistent(header: Header, found: Catalogue) -> bool:
    """Whether the shapes of all modules are consistent."""
    try:
        for parts in found.modules.values():
            check_module({part: header.shapes[key] for part, key in parts.items() if part != "alpha"}, str(header.path))
    except UsageError:
        return False
    return True
