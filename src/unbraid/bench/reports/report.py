"""The report: a self-contained HTML page, the tables as Markdown, and the plots."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from unbraid.bench.reports import claims, plots, published, tables
from unbraid.bench.reports.stats import problems
from unbraid.bench.reports.tables import Table
from unbraid.bench.results import Unit, complete, save
from unbraid.bench.rows.version import truth_digest
from unbraid.bench.truth.tasks import TASKS
from unbraid.common.atomic import atomic


@dataclass(frozen=True)
class Section:
    """The part of the report on one task."""

    name: str
    about: str
    scores: Table
    leads: Table
    over: tuple[tuple[str, Table], ...]  # the name of a row, and all others against it
    uses: Table | None
    failures: Table
    costs: Table
    pictures: tuple[Path, ...]


def write(units: Sequence[Unit], planned: int, work: Path, out: Path, over: Sequence[str] = ()) -> list[Path]:
    """Write report.html, table.md, results.jsonl and a few plots per task into `out`. `planned`: the number of units of a complete run.
    `over`: rows that all others are compared with in leads.md, a table each, in the tasks that have them.

    Means are over the problems that all rows of a task have; a pair of rows is compared on all that both have."""
    compared, tasks = complete(units), {unit.task for unit in units}
    sections = [_section(units, compared, task, (work, out), over) for task in TASKS if task in tasks]
    verdicts = tables.claims(claims.verdicts(units))
    about = _about(units, planned)
    page = Environment(loader=PackageLoader("unbraid.bench.reports", "."), autoescape=True).get_template(
        "report.html.j2"
    )
    html = page.render(
        about=about, tasks=[_embedded(section) for section in sections], claims=verdicts, published=_published()
    )
    with atomic(out / "report.html") as part:
        part.write_text(html, "utf-8")
    with atomic(out / "table.md") as part:
        part.write_text(_markdown(about, sections, verdicts), "utf-8")
    files = [out / "report.html", out / "table.md", save(units, out / "results.jsonl")]
    (out / "leads.md").unlink(missing_ok=True)  # it may be of other units
    if over:
        named = [(section.name, *one) for section in sections for one in section.over]
        parts = [about, *(f"## {task}: against {other}\n\n{table.markdown}" for task, other, table in named)]
        with atomic(out / "leads.md") as part:
            part.write_text("\n\n".join(parts) + "\n", "utf-8")
        files.insert(2, out / "leads.md")
    return files


def _section(
    every: Sequence[Unit], units: Sequence[Unit], task: str, folders: tuple[Path, Path], over: Sequence[str]
) -> Section:
    """`every`: all units; `units`: those of the problems that all rows have; `folders`: of the pictures and of the report."""
    work, out = folders
    rows = tables.order(problems(units, task))
    pictures = [
        plots.scatter(units, task, out / f"{task}-scatter.png"),
        plots.sheet(units, task, work, out / f"{task}-sheet.webp"),
        plots.by_problem(units, task, out / f"{task}-problems.png"),
        plots.costs(units, task, out / f"{task}-costs.png"),
    ]
    several = len({drawing.use for unit in units if unit.task == task for drawing in unit.drawings}) > 1
    return Section(
        task,
        TASKS[task],  # type: ignore[index]
        tables.scores(units, task),
        tables.leads(every, task, rows),
        tuple((other, tables.over(every, task, rows, other)) for other in over if other in rows),
        tables.uses(units, task) if several else None,
        tables.failures(units, task),
        tables.costs(units, task),
        tuple(one for one in pictures if one),
    )


def _published() -> list[tuple[str, Table]]:
    """(caption, table) of every published table."""
    shown = [(published.caption(one), published.cells(one)) for one in published.published()]
    return [(caption, Table(tuple(head), tuple(map(tuple, lines)))) for caption, (head, *lines) in shown]


def _about(units: Sequence[Unit], planned: int) -> str:
    # results from before the judge and the art had a digest record none
    bases, truths = (
        ", ".join(sorted({unit.made.get(of, "not recorded") for unit in units})) for of in ("base", "truth")
    )
    seeds = ", ".join(map(str, sorted({unit.seed for unit in units})))
    own = "" if truths == truth_digest() else f" (here: {truth_digest()})"
    return f"{len(units)} of {planned} units; seeds {seeds}; base {bases}; judge and art {truths}{own}."


def _embedded(section: Section) -> dict[str, object]:
    kinds = {".png": "image/png", ".webp": "image/webp"}
    shown = [
        {"name": one.stem, "data": f"data:{kinds[one.suffix]};base64,{base64.b64encode(one.read_bytes()).decode()}"}
        for one in section.pictures
    ]
    return {**vars(section), "pictures": shown}


def _markdown(about: str, sections: Sequence[Section], verdicts: Table) -> str:
    parts = [about]
    for section in sections:
        parts += [f"## {section.name}", section.scores.markdown, section.leads.markdown]
        parts += [one.markdown for one in (section.uses, section.costs) if one]
    parts += ["## claims", verdicts.markdown] if verdicts.lines else []
    return "\n\n".join(parts) + "\n"
