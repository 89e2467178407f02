"""`unbraid selftest`: parse, call, print."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from unbraid.cli.options import BaseName
from unbraid.cli.progress import console

app = typer.Typer()
MIB = 2**20
LOG = "selftest.log"


@app.command()
def selftest(
    base: BaseName = "icons",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; without, the best that there is.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A row by its name; repeatable.")] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder to work in, which stays; else a temporary one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result for programs, on stdout.")] = False,
) -> int:
    """Test everything on this device, for a few steps each.

    Prints a table of what works. Exit status 1 if anything does not."""
    with console.status("loading", spinner="line"):
        from unbraid.runs.selftest.rows import about, choose, pick, run_checks, working
        from unbraid.runs.selftest.scene import Scene

        where = pick(device)
        chosen, facts = choose(where, only or ()), about(base, where)
    rows = []
    with working(keep) as folder, console.status("", spinner="line") as status:
        events = run_checks(chosen, Scene(base, where, folder))
        for i, check in enumerate(chosen):
            status.update(f"{i + 1} of {len(chosen)}: {check.name}")
            rows.append(row := next(events))
            if not console.is_terminal:
                _progress(f"{i + 1} of {len(chosen)}: {row.name}: {'pass' if row.passed else 'FAILED'}")
    failed = [row for row in rows if not row.passed]
    log = _log(failed, facts, (keep or Path()) / LOG) if failed else None
    (_print_json if as_json else _print)(rows, facts, log)
    return 1 if failed else 0


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _log(failed: Sequence[Any], facts: Mapping[str, str], path: Path) -> Path | None:
    """Write the tracebacks to a file, and return it. If that fails, print them to stderr: users need them to report."""
    text = "\n".join(
        [*(f"{key}: {value}" for key, value in facts.items()), *(f"\n{row.name}\n{row.trace}" for row in failed)]
    )
    try:
        path.write_text(text)
    except OSError:
        print(text, file=sys.stderr)
        return None
    return path


def _print_json(rows: Sequence[Any], facts: Mapping[str, str], log: Path | None) -> None:
    from dataclasses import asdict

    passed = sum(row.passed for row in rows)
    found = {"about": facts, "rows": [asdict(row) for row in rows], "passed": passed, "total": len(rows)}
    print(json.dumps({**found, "log": str(log) if log else None}, indent=1))


def _print(rows: Sequence[Any], facts: Mapping[str, str], log: Path | None) -> None:
    out = Console(highlight=False, markup=False, soft_wrap=False)
    for key, value in facts.items():
        print(f"{key + ':':<14}{value}")
    table = Table("", "", "seconds", "peak MiB", "estimate MiB", "", box=None, pad_edge=False)
    for column in table.columns[2:5]:
        column.justify = "right"
    for row in rows:
        sizes = ("" if size is None else f"{size / MIB:.0f}" for size in (row.peak, row.estimate))
        table.add_row(
            row.name, "pass" if row.passed else "FAILED", f"{row.seconds:.1f}", *sizes, row.note if row.passed else ""
        )
    out.print()
    out.print(table)
    print()
    for row in rows:
        if not row.passed:
            print(f"{row.name}: {row.note}")
    if log:
        print(f"The full tracebacks: {log}")
    print(f"{sum(row.passed for row in rows)} of {len(rows)} pass, {sum(row.seconds for row in rows):.0f} s")
