"""Checks of a file's header, made before anything is allocated for its tensors or matched against its names. No torch.

safetensors has already checked that the offsets fit the file, and that sizes fit shapes and dtypes.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path

from unbraid.common.errors import UsageError
from unbraid.files.formats.kinds import KIND, LOHA, LOKR, VECTORS, sizes

MAX_KEYS = 50_000
MAX_HEADER = 16 << 20  # bytes; thumbnails and tag counts take a few MB at most
MAX_KEY = 500  # characters
MAX_DIMENSIONS = 8
MAX_SIZE = 2**31  # of one dimension
MAX_RANK = 4096  # higher ranks are refused
MAX_DENSE = 2**29  # numbers in one weight; Flux.2's largest weight has 3.4e8
DAMAGED = "The file is damaged, or made to do harm."
Shape = tuple[int, ...]


def check_size(path: Path) -> None:
    """Errors: a header that is larger than any LoRA's and would take minutes to parse."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < size < path.stat().st_size:
        raise UsageError(f"a header of {size >> 20} MiB", path, "Take out its metadata, or get the file again.")


def check(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Check the names and shapes of any safetensors file. Errors: names or dimensions that no model has."""
    for key, shape in shapes.items():
        if len(key) > MAX_KEY:
            raise UsageError(f"a tensor's name of {len(key)} characters", path, DAMAGED)
        if len(shape) > MAX_DIMENSIONS:
            raise UsageError(f"a tensor of {len(shape)} dimensions: {key[:60]}", path, DAMAGED)
        if any(size > MAX_SIZE for size in shape):
            raise UsageError(f"a tensor of {max(shape)} in one dimension: {key[:60]}", path, DAMAGED)


def check_module(parts: Mapping[str, Shape], where: str) -> None:
    """Check the shapes of one module's tensors, of any supported kind. Errors: shapes that do not fit or are too large, missing tensors."""
    if any(0 in shape for shape in parts.values()):
        raise UsageError("a tensor is empty", where, "The file is damaged.")
    norm = len(parts.get("diff", ())) == 1
    vectors = {part for part in parts if part in (*VECTORS, "dora_scale") or (norm and part == "diff")}
    for part in vectors:
        if not parts[part] or prod(parts[part]) != max(parts[part]):
            raise UsageError(f"{part} of {_text(parts[part])} is no vector", where, "The file is damaged.")
    weight = {part: shape for part, shape in parts.items() if part not in vectors}
    kinds = {KIND.get(part, "LoRA") for part in weight}
    if len(kinds) > 1:
        raise UsageError(f"two kinds of change, {' and '.join(sorted(kinds))}", where, "The file is damaged.")
    if "dora_scale" in parts and not weight:
        raise UsageError("DoRA's magnitude without its change", where, "The file is incomplete.")
    if "LoRA" in kinds or (not vectors and not kinds):
        check_factors(weight, where)
    elif kinds:
        _check_kind(weight, where)


def _check_kind(parts: Mapping[str, Shape], where: str) -> None:
    """Check the shapes of LoHa, LoKr and full changes."""
    wanted = _wanted(parts)
    if missing := sorted(wanted - set(parts)):
        raise UsageError(f"{' and '.join(missing)} is missing", where, "The file is incomplete.")
    if more := sorted(set(parts) - wanted):
        raise UsageError(f"{more[0]} does not belong to its other tensors", where, "The file is damaged.")
    size = sizes(parts)
    if not size or len(parts.get("lokr_w1", (1, 1))) != 2:
        raise UsageError("shapes do not fit each other", where, "The file is damaged.")
    ranks = [parts[part][0] for part in wanted if part.endswith("_b")]
    if max(ranks, default=0) > MAX_RANK:
        raise UsageError(f"rank {max(ranks)}", where, f"LoRAs of a rank over {MAX_RANK} are not read.")
    cores = [prod(parts[core][2:]) * parts[a][0] * parts[b][1] for core, a, b in _CORES if core in parts]
    if max(prod(size), *cores, 0) > MAX_DENSE:
        raise UsageError(f"a change of {_text(size)} numbers is too large", where, "No known model has such a layer.")


_CORES = (("hada_t1", "hada_w1_a", "hada_w1_b"), ("hada_t2", "hada_w2_a", "hada_w2_b"))
_CORES += (("lokr_t2", "lokr_w2_a", "lokr_w2_b"),)


def _wanted(parts: Mapping[str, Shape]) -> set[str]:
    """The parts that a module must have, given those that it has."""
    if "diff" in parts:
        return {"diff"}
    if any(part in LOHA for part in parts):
        return set(LOHA if {"hada_t1", "hada_t2"} & set(parts) else LOHA[:4])
    first = {"lokr_w1_a", "lokr_w1_b"} if {"lokr_w1_a", "lokr_w1_b"} & set(parts) else {"lokr_w1"}
    second = {part for part in LOKR[4:] if part in parts}
    return first | (second | {"lokr_w2_a", "lokr_w2_b"} if second else {"lokr_w2"})


def check_factors(parts: Mapping[str, Shape], where: str) -> None:
    """Check the shapes of a plain LoRA module. Errors: factors that cannot be multiplied, a rank that is too high."""
    if "dense" in parts:
        _dense(parts, where)
        return
    if "down" not in parts or "up" not in parts:
        missing = " and ".join(sorted({"down", "up"} - set(parts)))
        raise UsageError(f"{missing} missing", where, "The file is incomplete.")
    down, up = parts["down"], parts["up"]
    fits = len(down) == len(up) and len(down) in (2, 4) and up[1] == down[0] and 0 not in down + up
    if not fits or (len(up) == 4 and up[2:] != (1, 1)):
        raise UsageError(f"shapes {_text(up)} · {_text(down)} do not fit", where, "The file is damaged.")
    if down[0] > MAX_RANK:
        raise UsageError(f"rank {down[0]}", where, f"LoRAs of a rank over {MAX_RANK} are not read.")
    mid = parts.get("mid")
    if mid is not None and not (len(mid) == 4 and len(down) == 4 and down[2:] == (1, 1) and mid[:2] == (down[0],) * 2):
        raise UsageError(f"a core of {_text(mid)} does not fit", where, "The file is damaged.")
    if mid is not None and down[0] * down[1] * prod(mid[2:]) > 2**28:
        raise UsageError(f"a core of {_text(mid)} is too large", where, "The file is damaged.")


def _dense(parts: Mapping[str, Shape], where: str) -> None:
    shape = parts["dense"]
    if set(parts) != {"dense"} or len(shape) != 2 or 0 in shape:
        raise UsageError("a whole change beside its factors, or of no matrix", where, "The file is damaged.")


def _text(shape: Shape) -> str:
    return "×".join(map(str, shape))
