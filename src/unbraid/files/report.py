"""`unbraid inspect`: what a LoRA file holds, block by block, and how much two LoRAs interfere with each other.

Computed from r×r Gram matrices in numpy; ΔW = s·B·A itself is not formed.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbraid.common.errors import UsageError
from unbraid.files.formats.blocks import Family, block_of
from unbraid.files.formats.gate import check_factors
from unbraid.files.formats.header import Catalogue, Header, adapter_metadata, catalogue, read_header
from unbraid.files.formats.kinds import KIND
from unbraid.files.formats.patterns import alpha_of
from unbraid.files.formats.tool_rules import naming
from unbraid.files.formats.weights import FLOATS, READABLE, Read, numbers

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class BlockReport:
    """One block: the number of its modules, ‖ΔW‖ over all of them (Frobenius), and its share of the file's squared norm."""

    block: str
    modules: int
    norm: float
    share: float


@dataclass(frozen=True)
class Report:
    """What a file holds. `namings`: the conventions that its keys follow. `ranks`, `alphas`: value → number of modules."""

    path: Path
    catalogue: Catalogue
    namings: tuple[str, ...]
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    dtypes: tuple[str, ...]
    blocks: tuple[BlockReport, ...]
    metadata: Mapping[str, str]

    @property
    def family(self) -> Family:
        return self.catalogue.verdict.family


@dataclass(frozen=True)
class Interference:
    """Two LoRAs compared in one block. `cosine`: between the whole changes. `columns`: |cos| between every column of ΔW_1 and
    the same column of ΔW_2 (ZipLoRA's measure, arXiv 2311.13600). `overlap`: share of the smaller input subspace that
    lies in the other one (the part that NP-LoRA removes). `norms`: ‖ΔW_1‖, ‖ΔW_2‖."""

    block: str
    cosine: float
    columns: Matrix
    overlap: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class _Module:
    """A module's factors as matrices, and the scale alpha / r."""

    down: Matrix
    up: Matrix
    scale: float


@dataclass(frozen=True)
class _Pair:
    """Two LoRAs compared in one module: ⟨ΔW_1, ΔW_2⟩, both squared norms, the overlap, and the columns' |cos|."""

    dot: float
    squares: tuple[float, float]
    overlap: float
    cosines: Matrix


def report(path: str | Path) -> Report:
    """Read a file's header, and its weights to compute norms. Errors: unreadable files, files without a LoRA."""
    header, found = _open(path)
    squares: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    ranks: dict[int, int] = defaultdict(int)
    alphas: dict[float, int] = defaultdict(int)
    for name, module in _modules(header, found):
        block, rank = block_of(name), len(module.down)
        ranks[rank] += 1
        alphas[round(module.scale * rank, 4)] += 1
        squares[block] += _square(module)
        counts[block] += 1
    total = sum(squares.values()) or 1.0
    blocks = tuple(
        BlockReport(b, counts[b], squares[b] ** 0.5, squares[b] / total) for b in sorted(squares, key=_order)
    )
    namings = tuple(sorted({naming(raw) for raw in found.raw.values()}))
    dtypes = tuple(sorted(set(header.dtypes.values())))
    return Report(header.path, found, namings, ranks, alphas, dtypes, blocks, header.metadata)


def interference(first: str | Path, second: str | Path) -> tuple[Interference, ...]:
    """Compare two files block by block, on the modules that both have.

    Errors: no module in common; shapes that do not fit (different base models).
    """
    header, found = _open(first)
    header2, found2 = _open(second)
    inner: dict[str, list[_Pair]] = defaultdict(list)
    settings = (adapter_metadata(header), adapter_metadata(header2))
    others = (_others(header, found), _others(header2, found2))
    with numbers(header) as read, numbers(header2) as read2:
        for name in found.modules:
            if name in found2.modules:
                mine = others[0].get(name) or _module(header, found, read, name, settings[0])
                theirs = others[1].get(name) or _module(header2, found2, read2, name, settings[1])
                if mine and theirs:
                    inner[block_of(name)].append(_compare(name, mine, theirs))
    if not inner:
        raise UsageError(
            "the two LoRAs have no module in common", f"{first}, {second}", "They do not touch each other."
        )
    return tuple(_summed(block, inner[block]) for block in sorted(inner, key=_order))


def _open(path: str | Path) -> tuple[Header, Catalogue]:
    header = read_header(Path(path))
    found = catalogue(header)
    if not found.modules:
        raise UsageError("there is no LoRA in it", path, "Give a LoRA file.")
    return header, found


def _modules(header: Header, found: Catalogue) -> Iterator[tuple[str, _Module]]:
    settings, others = adapter_metadata(header), _others(header, found)
    with numbers(header) as read:
        for name in found.modules:
            module = others.get(name) or _module(header, found, read, name, settings)
            if module:
                yield name, module


def _others(header: Header, found: Catalogue) -> dict[str, _Module]:
    """The modules that are not plain LoRAs, converted to factors by `unbraid.files.changes`. Only these need torch. DoRA is left out,
    because converting it needs the base."""
    names = [
        name
        for name, parts in found.modules.items()
        if "dora_scale" not in parts and any(KIND.get(part) in ("LoHa", "LoKr", "full changes") for part in parts)
    ]
    if not names:
        return {}
    from unbraid.files.changes import LENIENT, as_lora
    from unbraid.files.opened import opened_lora

    out = {}
    with opened_lora(header.path) as file:
        for name in names:
            lora = as_lora(file, name, LENIENT).lora
            if lora:
                down, up = (part.flatten(1).numpy() for part in (lora.down, lora.up))
                out[name] = _Module(down, up, lora.alpha / len(down))
    return out


def _module(header: Header, found: Catalogue, read: Read, name: str, settings: Mapping[str, Any]) -> _Module | None:
    """The factors of a module; None if it is not a plain LoRA (`doctor` reports such modules)."""
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
    return _Module(down.reshape(rank, -1), up.reshape(len(up), -1), alpha / rank)


def _alpha(header: Header, read: Read, key: str) -> float:
    if header.dtypes[key] not in READABLE or header.shapes[key].count(1) != len(header.shapes[key]):
        raise UsageError("alpha is not one number", f"{header.path}: {key}", "The file is damaged.")
    return float(read(key).flat[0])


def _square(module: _Module) -> float:
    """‖sBA‖² = s² Σ (BᵀB) ∘ (AAᵀ), or computed from BA if that matrix is smaller."""
    up, down = module.up, module.down
    if len(down) ** 2 > len(up) * down.shape[1]:
        return module.scale**2 * float(np.square(up @ down).sum())
    return module.scale**2 * max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)


def _compare(name: str, a: _Module, b: _Module) -> _Pair:
    if a.down.shape[1] != b.down.shape[1] or len(a.up) != len(b.up):
        raise UsageError("the two LoRAs' shapes differ", name, "They were made for different base models.")
    dots = (a.down * (a.up.T @ b.up @ b.down)).sum(0) * a.scale * b.scale
    squares = [(m.down * (m.up.T @ m.up @ m.down)).sum(0).clip(0) * m.scale**2 for m in (a, b)]
    size = np.sqrt(squares[0] * squares[1])
    cosines = np.abs(np.divide(dots, size, out=np.zeros_like(dots), where=size > 0)).clip(0, 1)
    white = [_whitening(m.down) for m in (a, b)]
    overlap = float(np.square(white[0].T @ (a.down @ b.down.T) @ white[1]).sum()) / min(w.shape[1] for w in white)
    return _Pair(float(dots.sum()), (float(squares[0].sum()), float(squares[1].sum())), overlap, cosines)


def _whitening(down: Matrix) -> NDArray[np.float64]:
    """W `[r, q]` such that the rows of Wᵀ·down are an orthonormal basis of the row space, from the r×r Gram matrix."""
    if len(down) > down.shape[1]:
        left, sizes, _ = np.linalg.svd(down.astype(np.float64), full_matrices=False)
        some = sizes > sizes[0] * 1e-3
        return left[:, some] / sizes[some] if sizes[0] else np.zeros((len(down), 1))
    values, vectors = np.linalg.eigh((down @ down.T).astype(np.float64))
    kept = values > values[-1] * 1e-6
    return vectors[:, kept] / np.sqrt(values[kept]) if kept.any() else np.zeros((len(down), 1))


def _summed(block: str, pairs: list[_Pair]) -> Interference:
    first, second = (sum(pair.squares[i] for pair in pairs) for i in (0, 1))
    cosine = sum(pair.dot for pair in pairs) / (first * second) ** 0.5 if first and second else 0.0
    overlap = sum(pair.overlap for pair in pairs) / len(pairs)
    return Interference(
        block, cosine, np.concatenate([pair.cosines for pair in pairs]), overlap, (first**0.5, second**0.5)
    )


def _order(block: str) -> tuple[int, str, int]:
    """Sort key: BASE, IN…, MID, OUT…, then a transformer's blocks by number."""
    stem, _, number = block.rpartition(".")
    if number.isdigit():
        return 9, stem, int(number)
    return ("BASE", "IN", "MID", "OUT").index(block.rstrip("0123456789")), block, 0
