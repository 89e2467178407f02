"""All rows of the benchmark: the sanity rows, the package's own, and those of other packages, which join by the entry point group
`unbraid.bench` (docs/benchmark.md)."""

from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points

from unbraid.bench.contenders import ABLATIONS, ROWS
from unbraid.bench.rows import SANITY, Row
from unbraid.common.errors import UsageError

GROUP = "unbraid.bench"


def all_rows() -> list[Row]:
    """The package's own rows, then those of other packages. Errors: an entry point that is no row, two rows of one name."""
    rows = [*SANITY, *ROWS, *ABLATIONS]
    for point in entry_points(group=GROUP):
        found = point.load()
        some = [found] if isinstance(found, Row) else list(found) if isinstance(found, Iterable) else [found]
        for row in some:
            if not isinstance(row, Row):
                raise UsageError(
                    f"{type(row).__name__} is not a Row", f"entry point {point.name}", "See docs/benchmark.md."
                )
            rows.append(row)
    seen = set()
    for row in rows:
        if (row.task, row.name) in seen:
            raise UsageError("two rows of this name", f"{row.task}: {row.name}", "Give it another name.")
        seen.add((row.task, row.name))
    return rows


def chosen(tasks: Sequence[str] = (), names: Sequence[str] = ()) -> list[Row]:
    """Rows by task and name; without names, all but ablations. Errors: a name that no row has."""
    rows = [row for row in all_rows() if not tasks or row.task in tasks]
    unknown = set(names) - {row.name for row in rows}
    if unknown:
        there = ", ".join(dict.fromkeys(row.name for row in rows))
        raise UsageError(f"there is no row {sorted(unknown)[0]!r}", "--only", f"There are: {there}.")
    return [row for row in rows if (row.name in names if names else not row.ablation)]
