"""The benchmark's tables as data, and as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from unbraid.bench.reports.claims import Verdict
from unbraid.bench.reports.stats import METRICS, Lead, Values, by_use, estimate, holm, lead, problems
from unbraid.bench.results import Unit
from unbraid.bench.rows.cost import Cost
from unbraid.bench.rows.row import BASE, CEILING, COPY

SANITY = (CEILING, COPY, BASE)
COMPARED = ("likeness", "content", "style", "leak", "structure")  # by these a row is compared with a named one


@dataclass(frozen=True)
class Table:
    """Lines of text under headings. `best`: (line, column) of the best value in each measured column, sanity rows excluded."""

    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()

    @property
    def markdown(self) -> str:
        out = ["| " + " | ".join(self.headings) + " |", "|---" * len(self.headings) + "|"]
        for i, line in enumerate(self.lines):
            cells = [f"**{cell}**" if (i, j) in self.best else cell for j, cell in enumerate(line)]
            out.append("| " + " | ".join(cells) + " |")
        return "\n".join(out)


def order(found: Mapping[str, Mapping[str, Values]]) -> list[str]:
    """The names of the rows: the ceiling first, then by likeness, the copy and the base alone last."""
    mine = [row for row in found if row not in SANITY]
    mine.sort(key=lambda row: -mean(one["likeness"] for one in found[row].values()))
    return [row for row in (CEILING, *mine, COPY, BASE) if row in found]


def scores(units: Iterable[Unit], task: str) -> Table:
    """A line per row and a column per metric, with the mean over problems and its 95 % interval."""
    found = problems(units, task)
    rows = order(found)
    columns = [name for name in METRICS if any(name in one for by in found.values() for one in by.values())]
    lines, values = [], {}
    for i, row in enumerate(rows):
        cells = []
        for j, name in enumerate(columns):
            some = [one[name] for one in found[row].values() if name in one]
            cells.append(str(estimate(some)) if some else "–")
            if some and row not in SANITY:
                values[i, j + 1] = mean(some) * (1 if METRICS[name][1] else -1)
        lines.append((row, *cells, str(len(found[row]))))
    best = {
        max((place for place in values if place[1] == j + 1), key=lambda place: values[place])
        for j in range(len(columns))
        if any(place[1] == j + 1 for place in values)
    }
    return Table(("", *columns, "problems"), tuple(lines), frozenset(best))


def uses(units: Iterable[Unit], task: str) -> Table:
    """Content and style for each use separately, for tasks with several uses."""
    some = list(units)
    found, rows = by_use(some, task), order(problems(some, task))
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    lines = [(row, *(str(found[row][one]) if one in found[row] else "–" for one in columns)) for row in rows]
    return Table(("", *columns), tuple(lines))


def leads(units: Iterable[Unit], task: str, rows: Sequence[str]) -> Table:
    """The first of some rows against each other one, on the problems that both have."""
    some, compared = list(units), [row for row in rows if row not in (CEILING, COPY)]
    if len(compared) < 2:
        return Table(("",), ())
    first, *others = compared
    known = holm([one for other in others if (one := lead(some, task, first, other))])
    lines = [(one.other, str(one.ahead), f"{one.wins} of {one.ahead.n}", _p(one)) for one in known]
    return Table((f"{first} ahead of", "by (likeness)", "on problems", "p, corrected"), tuple(lines))


def over(units: Iterable[Unit], task: str, rows: Sequence[str], other: str) -> Table:
    """Every row minus `other`, on the problems that both have, in the metrics of `COMPARED` and for each use of a task with several.
    p-values as they are, and after Holm's correction over the rows (not the sanity rows), measure by measure."""
    some = [unit for unit in units if unit.task == task]
    uses = dict.fromkeys(drawing.use for unit in some for drawing in unit.drawings)
    measures = [(name, "") for name in COMPARED]
    measures += [(name, use) for use in uses if len(uses) > 1 for name in ("content", "style", "leak")]
    lines = []
    for name, use in measures:
        found = [one for row in rows if row != other and (one := lead(some, task, row, other, name, use))]
        fair = {one.row: _p(one) for one in holm([one for one in found if one.row not in SANITY])}
        for one in found:
            what = f"{use}: {name}" if use else name
            figures = (one.mine, one.theirs, one.ahead, f"{one.wins} of {one.ahead.n}", _p(one), fair.get(one.row, "–"))
            lines.append((one.row, what, *map(str, figures)))
    lines.sort(key=lambda line: rows.index(line[0]))
    headings = ("", "measured by", "mean", f"{other}'s mean", "difference", "higher on", "p", "p, corrected")
    return Table(headings, tuple(lines))


def _p(one: Lead) -> str:
    return f"{one.p:.3f}" if one.p >= 0.001 else "< 0.001"


def costs(units: Iterable[Unit], task: str) -> Table:
    """The mean cost of each row per cell. Means, because medians would hide a search that is done once."""
    some = [unit for unit in units if unit.task == task]
    lines = []
    for row in order(problems(some, task)):
        mine = [unit.cost for unit in some if unit.row == row]
        if row not in SANITY and mine:
            lines.append((row, *_cost(mine)))
    return Table(("", "seconds", "TFLOP", "peak memory, MB", "trained parameters", "file, MB"), tuple(lines))


def _cost(mine: Sequence[Cost]) -> tuple[str, ...]:
    peaks = [one.memory for one in mine if one.memory is not None]
    parameters = max(one.parameters for one in mine)
    return (
        f"{mean(one.seconds for one in mine):.1f}",
        f"{mean(one.flops for one in mine) / 1e12:.2f}",
        f"{max(peaks) / 1e6:.0f}" if peaks else "–",
        f"{parameters:,}" if parameters else "–",
        f"{mean(one.file for one in mine) / 1e6:.2f}",
    )


def failures(units: Iterable[Unit], task: str, count: int = 5) -> Table:
    """The problems on which the best row has its lowest likeness, and the likeness of the other rows there."""
    found = problems(units, task)
    rows = [row for row in order(found) if row not in (CEILING, COPY)]
    if not rows:
        return Table(("",), ())
    worst = sorted(found[rows[0]], key=lambda one: found[rows[0]][one]["likeness"])[:count]
    lines = [
        (problem, *(f"{found[row][problem]['likeness']:.2f}" if problem in found[row] else "–" for row in rows))
        for problem in worst
    ]
    return Table(("likeness", *rows), tuple(lines))


def claims(verdicts: Iterable[Verdict]) -> Table:
    """The published claims, and whether they hold here."""
    lines = [
        (
            f"{one.claim.task}: {one.claim.row} {'above' if METRICS[one.claim.metric][1] else 'below'} {one.claim.other}",
            one.claim.metric,
            one.claim.source,
            str(one.lead.ahead),
            _p(one.lead),
            one.word,
        )
        for one in verdicts
    ]
    return Table(("claim", "measured by", "source", "difference", "p, corrected", "here"), tuple(lines))
