"""All rows of the benchmark: the sanity rows, the package's own, and those that other packages register under the entry point
group `unbraid.bench` (docs/benchmark.md)."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points

from unbraid.bench.rows import combine, modules, sanity, separate, transfer
from unbraid.bench.rows.row import Row
from unbraid.common.errors import UsageError

GROUP = "unbraid.bench"
ROWS = [*separate.ROWS, *combine.ROWS, *modules.ROWS, *transfer.ROWS]


def all_rows() -> list[Row]:
    """Every row, ablations included. Errors: an entry point that gives something else than rows, two rows of one name in a task."""
    rows = [*sanity.ROWS, *ROWS]
    for point in entry_points(group=GROUP):
        loaded = point.load()
        for row in loaded if isinstance(loaded, Iterable) else [loaded]:
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
    """The rows of these tasks and names; without tasks those of all tasks, without names all but ablations, and for the
    name `all` those, too. Errors: an unknown name."""
    rows = [row for row in all_rows() if not tasks or row.task in tasks]
    if any(name.lower() == "all" for name in names):
        return rows
    wanted = {named(name, rows, "--only") for name in names}
    return [row for row in rows if (row.name in wanted if names else not row.ablation)]


def named(name: str, rows: Iterable[Row], where: str) -> str:
    """The name of one of these rows as it is written there. `where`: the option that has it. Errors: none has this name."""
    known = {row.name.lower(): row.name for row in rows}
    if name.lower() not in known and any(name.lower() == row.name.lower() for row in all_rows()):
        raise UsageError(
            f"the row {name!r} is not among those chosen", where, "Give its --task, and --only all or itself."
        )
    if name.lower() not in known:
        near = get_close_matches(name.lower(), known, 1)
        fix = f"Did you mean {known[near[0]]!r}?" if near else "`unbraid bench --only list` prints all."
        raise UsageError(f"there is no row {name!r}", where, fix)
    return known[name.lower()]
