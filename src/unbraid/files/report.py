"""`unbraid inspect`: what a LoRA file holds, block by block, and how much two LoRAs interfere with each other.

Computed from r×r Gram matrices in numpy; ΔW = s·B·A itself is not formed.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unbraid.common.errors import UsageError
from unbraid.files.factors import Factors, Matrix, factors, incomplete
from unbraid.files.formats.blocks import Family, block_of
from unbraid.files.formats.header import Catalogue, Header, catalogue, read_header
from unbraid.files.formats.tool_rules import naming


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
    incomplete: Mapping[str, str]  # module → which of its tensors are missing

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
    with factors(header, found) as factors_of:
        for name in found.modules:
            if module := factors_of(name):
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
    return Report(header.path, found, namings, ranks, alphas, dtypes, blocks, header.metadata, incomplete(found))


def interference(first: str | Path, second: str | Path) -> tuple[Interference, ...]:
    """Compare two files block by block, on the modules that both have.

    Errors: no module in common; shapes that do not fit (different base models).
    """
    header, found = _open(first)
    header2, found2 = _open(second)
    inner: dict[str, list[_Pair]] = defaultdict(list)
    with factors(header, found) as first_of, factors(header2, found2) as second_of:
        for name in found.modules:
            if name in found2.modules:
                mine, theirs = first_of(name), second_of(name)
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


def _square(module: Factors) -> float:
    """‖sBA‖² = s² Σ (BᵀB) ∘ (AAᵀ), or computed from BA if that matrix is smaller."""
    up, down = module.up, module.down
    if len(down) ** 2 > len(up) * down.shape[1]:
        return module.scale**2 * float(np.square(up @ down).sum())
    return module.scale**2 * max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)


def _compare(name: str, a: Factors, b: Factors) -> _Pair:
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
