"""A file's modules as factors in numpy, for code that only measures them. Modules that cannot be read are skipped, with the reason."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.common.errors import UsageError
from unbraid.files.formats.gate import check_factors, check_module, missing
from unbraid.files.formats.header import Catalogue, Header, adapter_metadata, opened
from unbraid.files.formats.kinds import KIND
from unbraid.files.formats.patterns import alpha_of
from unbraid.files.formats.weights import FLOATS, READABLE, Read, numbers

Matrix = NDArray[np.float32]
_KINDS = ("LoHa", "LoKr", "full changes")


@dataclass(frozen=True)
class Factors:
    """A module's factors as matrices, `[r, k]` and `[d, r]`; scale = alpha / r."""

    down: Matrix
    up: Matrix
    scale: float


@contextmanager
def factors(header: Header, found: Catalogue) -> Iterator[Callable[[str], Factors | None]]:
    """A function name → factors; None for what is incomplete or no change of a weight that is read: see `incomplete`.

    LoHa, LoKr and full changes are cut as `unbraid.files.changes` says; of DoRA, which needs its base, the factors are shown as
    they are. Errors: damaged modules, NaN."""
    settings, others = adapter_metadata(header), _others(header, found)
    with numbers(header) as read:
        yield lambda name: others.get(name) or _plain(header, found, read, name, settings)


def incomplete(found: Catalogue) -> dict[str, str]:
    """Module → which of its tensors are missing, for those that lack some."""
    return {name: lacking for name, parts in found.modules.items() if (lacking := missing(parts))}


def _others(header: Header, found: Catalogue) -> dict[str, Factors]:
    """The modules of other kinds; for these alone torch is imported."""
    names = [
        name
        for name, parts in found.modules.items()
        if "dora_scale" not in parts and any(KIND.get(part) in _KINDS for part in parts) and not missing(parts)
    ]
    if not names:
        return {}
    from unbraid.files.changes import LENIENT, as_lora
    from unbraid.files.opened import Opened

    out = {}
    with opened(header.path, "pt") as handle:
        file = Opened(header, found, found.verdict.family, handle, adapter_metadata(header))
        for name in names:
            shapes = {part: header.shapes[key] for part, key in found.modules[name].items() if part != "alpha"}
            check_module(shapes, file.where(name))
            if lora := as_lora(file, name, LENIENT).lora:
                down, up = (part.flatten(1).numpy() for part in (lora.down, lora.up))
                out[name] = Factors(down, up, lora.alpha / len(down))
    return out


def _plain(header: Header, found: Catalogue, read: Read, name: str, settings: Mapping[str, Any]) -> Factors | None:
    parts = found.modules[name]
    if "down" not in parts or "up" not in parts or "mid" in parts:
        return None
    if any(header.dtypes[parts[part]] not in FLOATS for part in ("down", "up")):
        return None
    where = f"{header.path}: {name}"
    check_factors({part: header.shapes[parts[part]] for part in ("down", "up")}, where)
    down, up = read(parts["down"]), read(parts["up"])
    rank = len(down)
    alpha = _alpha(header, read, parts["alpha"]) if "alpha" in parts else alpha_of(settings, name, rank)
    largest = [float(np.abs(part).max()) for part in (down, up)]
    if (
        not np.isfinite([*largest, alpha]).all()
        or max(*largest, abs(alpha), largest[0] * largest[1] * abs(alpha)) > 1e15
    ):
        raise UsageError("NaN, infinite or far too large weights", where, "The training diverged; see unbraid doctor.")
    return Factors(down.reshape(rank, -1), up.reshape(len(up), -1), alpha / rank)


def _alpha(header: Header, read: Read, key: str) -> float:
    if header.dtypes[key] not in READABLE or header.shapes[key].count(1) != len(header.shapes[key]):
        raise UsageError("alpha is not one number", f"{header.path}: {key}", "The file is damaged.")
    return float(read(key).flat[0])
