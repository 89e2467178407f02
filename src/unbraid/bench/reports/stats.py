"""Statistics of units: one value per problem, means with bootstrap intervals, paired tests between rows.

A problem is a cell without its seed; in `transfer`, each subject that is drawn is a problem of its own. Seeds are averaged first,
because two seeds of one problem are not two independent problems.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from scipy import stats

from unbraid.bench.results import Drawing, Unit
from unbraid.bench.truth.scores import harmonic

METRICS = {  # name → (meaning, whether more is better)
    "likeness": ("harmonic mean of content and style", True),
    "content": ("judge's content cosine to the true picture", True),
    "style": ("judge's style cosine to the true picture", True),
    "distance": ("distance of the latents to the true picture's; 1 is an empty page", False),
    "leak": ("cosine to what must not show", False),
    "named": ("share of the judge's answers that are the right subject or style", True),
    "structure": ("correlation of the edges with those of the base's own drawing", True),
    "diversity": ("distance of the latents of two drawings of one prompt", True),
}
RESAMPLES, LEVEL = 5000, 0.95
Values = Mapping[str, float]  # metric → value


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` problems and its bootstrap interval, which is None for a single problem."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.low is None else f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Lead:
    """How far `row` is ahead of `other` in a metric: paired differences on the problems that both have. `wins`: on how many `row` has the
    higher value; less is better for some metrics. `mine`, `theirs`: what `row` and `other` have there."""

    row: str
    other: str
    mine: Estimate
    theirs: Estimate
    ahead: Estimate
    p: float  # two-sided sign-flip permutation test; `holm` corrects several
    wins: int


def problems(units: Iterable[Unit], task: str) -> dict[str, dict[str, Values]]:
    """Row → problem → metric → mean over seeds."""
    found: dict[str, dict[str, list[Values]]] = defaultdict(lambda: defaultdict(list))
    for unit in units:
        if unit.task == task:
            for problem, drawings in _apart(unit).items():
                found[unit.row][problem].append(_values(unit, drawings))
    return {
        row: {
            problem: {name: fmean(one[name] for one in some if name in one) for name in some[0]}
            for problem, some in by_problem.items()
        }
        for row, by_problem in found.items()
    }


def _apart(unit: Unit) -> dict[str, list[Drawing]]:
    """Problem → its drawings in a unit."""
    cell = unit.cell.removesuffix(f", seed {unit.seed}")
    if unit.task != "transfer":
        return {cell: list(unit.drawings)}
    out: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in unit.drawings:
        out[f"{drawing.subject}, {drawing.style}"].append(drawing)
    return dict(out)


def _values(unit: Unit, drawings: Sequence[Drawing]) -> Values:
    """Metric → mean over uses. Each use has the same weight, however many drawings it has."""
    uses: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        uses[drawing.use].append(drawing)
    out: dict[str, float] = {}
    for name in METRICS:
        means = [
            fmean(one.scores[name] for one in some if name in one.scores)
            for some in uses.values()
            if any(name in one.scores for one in some)
        ]
        if means:
            out[name] = fmean(means)
    out = {"likeness": harmonic(out["content"], out["style"]), **out}
    return out if unit.diversity is None or unit.task == "transfer" else {**out, "diversity": unit.diversity}


def by_use(units: Iterable[Unit], task: str) -> dict[str, dict[str, Estimate]]:
    """Row → `use: metric` → estimate, for the metrics content and style."""
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for unit in units:
        for drawing in unit.drawings if unit.task == task else ():
            for name in ("content", "style"):
                cell = unit.cell.removesuffix(f", seed {unit.seed}")
                found[unit.row][f"{drawing.use}: {name}"][cell].append(drawing.scores[name])
    return {
        row: {column: estimate([fmean(some) for some in cells.values()]) for column, cells in columns.items()}
        for row, columns in found.items()
    }


def estimate(values: Sequence[float]) -> Estimate:
    """The mean over problems and its percentile bootstrap interval. It does not depend on the order of the values."""
    if len(values) < 2 or len(set(values)) == 1:
        return Estimate(fmean(values), None, None, len(values))
    found = stats.bootstrap(
        (_in_order(values),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(fmean(values), float(found.low), float(found.high), len(values))


def _in_order(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The same resamples are drawn in every order of the units, and for `b` against `a` those of `a` against `b`."""
    some = np.asarray(values, float)
    return some[np.lexsort((some, np.abs(some)))]


def lead(
    units: Iterable[Unit], task: str, row: str, other: str, metric: str = "likeness", use: str = ""
) -> Lead | None:
    """The paired comparison of two rows, on the cells (a problem at a seed) that both have; None if they share none. `use`: of the drawings
    of this use alone."""
    some = [unit for unit in units if unit.task == task and unit.row in (row, other)]
    if use:
        apart = [(unit, tuple(one for one in unit.drawings if one.use == use)) for unit in some]
        some = [replace(unit, drawings=drawings, diversity=None) for unit, drawings in apart if drawings]
    had = {one: {unit.cell for unit in some if unit.row == one} for one in (row, other)}
    found = problems([unit for unit in some if unit.cell in had[row] & had[other]], task)
    shared = [
        one for one in found.get(row, {}) if metric in found[row][one] and metric in found.get(other, {}).get(one, {})
    ]
    if not shared:
        return None
    mine, theirs = ([found[each][one][metric] for one in shared] for each in (row, other))
    ahead = _in_order(np.asarray(mine) - np.asarray(theirs))
    p = 1.0
    if len(ahead) > 1 and np.any(ahead != 0):
        p = float(
            stats.permutation_test(
                (ahead,),
                np.mean,
                permutation_type="samples",
                vectorized=True,
                n_resamples=RESAMPLES,
                rng=np.random.default_rng(0),
            ).pvalue
        )
    return Lead(row, other, estimate(mine), estimate(theirs), estimate(ahead.tolist()), p, int((ahead > 0).sum()))


def holm(leads: Sequence[Lead]) -> list[Lead]:
    """The same comparisons with p-values corrected for their number (Holm 1979)."""
    out, largest = list(leads), 0.0
    for rank, i in enumerate(sorted(range(len(leads)), key=lambda i: leads[i].p)):
        largest = max(largest, min(1.0, leads[i].p * (len(leads) - rank)))
        out[i] = replace(leads[i], p=largest)
    return out
