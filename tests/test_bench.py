"""The benchmark: it resumes, its sanity rows score as expected, its statistics are right, and other packages can add rows."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from unbraid.bench import grid, registry, results
from unbraid.bench.registry import all_rows, chosen
from unbraid.bench.reports import claims, plots, report, stats, tables
from unbraid.bench.results import Drawing, Unit
from unbraid.bench.rows import combine, cost, sanity, training_cache
from unbraid.bench.rows.row import BASE, CEILING, COPY, Row
from unbraid.bench.rows.training_cache import Drawer, TrainingCache
from unbraid.bench.truth import tasks
from unbraid.bench.truth.tasks import FULL, MEDIUM, QUICK, TASKS, Scale, cells, items
from unbraid.bench.truth.truths import Truth
from unbraid.cli.main import app, main
from unbraid.common.errors import UsageError
from unbraid.core.selectors import TABLES
from unbraid.runs.api import split_job
from unbraid.runs.job import Job
from unbraid.sampling.uses import OWN, STYLE_NAME, Use

DOCS = Path(__file__).parent.parent / "docs" / "benchmark.md"
FEW = {method: {"steps": 2, "rank": 4} for method in ("dreambooth", "blora", "break", "slider")}
FEW |= {"unziplora": {"steps": 3, "rank": 4, "window": 1}, "ziplora": {"steps": 2}, "make": {"fine_tune": 1}}
FEW |= {"pair": {"steps": 2, "rank": 4, "style_from": 1}, "consislora": {"steps": 1, "style_steps": 1, "rank": 4}}
FEW |= {method: {"steps": 2, "rank": 4} for method in ("qr-lora", "qr-split")}
SEGMENTS = "ablation: UnZipLoRA, segments"  # refused on bases without joint attention
TINY = replace(QUICK, others=1, steps=2, training=FEW)


def draw_less(put: Callable[[object, str, object], None] = setattr) -> None:
    """One style of a content and one subject of a style in `separate`, not four."""
    put(tasks, "TRAINED", tasks.TRAINED[:1])
    put(tasks, "SHOWN", tasks.SHOWN[:1])


def count_once(patch: pytest.MonkeyPatch) -> None:
    """FLOPs are counted once per method: for every row it would be a third of the time of these short trainings."""
    counts: dict[str, cost.Cost] = {}

    def counted(job: Job) -> cost.Cost:
        if job.method not in counts:
            counts[job.method] = cost.counted(job)
        return counts[job.method]

    patch.setattr(training_cache, "counted", counted)


@pytest.fixture
def less_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_less(monkeypatch.setattr)


def tiny(work: Path, base: Path, *names: str, task: str = "") -> list[grid.Todo]:
    return grid.plan(work, TINY, chosen((task,) if task else (), names), str(base))


def table(done: list[grid.Done]) -> str:
    units = [one.unit for one in done if one.unit]
    assert len(units) == len(done), [one.error for one in done if one.error]
    return "\n".join(tables.scores(units, task).markdown for task in TASKS if any(unit.task == task for unit in units))


@pytest.mark.slow
@pytest.mark.usefixtures("less_drawn")
def test_every_row_runs_and_is_reported(tmp_path: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "WEIGHTS", (0.5, 1.0))
    monkeypatch.setattr(combine, "TUNING", ("horse",))
    used: set[str] = set()
    train = TrainingCache.train
    monkeypatch.setattr(TrainingCache, "train", lambda cache, job: used.add(job.method) or train(cache, job))
    count_once(monkeypatch)
    done = []
    for todo in grid.plan(tmp_path, TINY, all_rows(), str(v_base)):
        used.clear()
        done += grid.run([todo])
        assert used <= set(grid._row(todo).methods), f"{todo.row} trains what it does not name"
    failed = {one.todo.row: one.error for one in done if one.error}
    assert failed.keys() == {SEGMENTS} and "cannot be divided into segments" in failed[SEGMENTS], failed
    units = [one.unit for one in done if one.unit]
    run = [row for row in all_rows() if row.name != SEGMENTS]
    assert {(unit.task, unit.row) for unit in units} == {(row.task, row.name) for row in run}
    trained = next(unit for unit in units if unit.row == "UnZipLoRA")
    assert trained.cost.flops > 0 and trained.cost.parameters > 0 and trained.cost.seconds > 0 and trained.cost.file > 0
    html, markdown, kept = report.write(units, len(units), tmp_path, tmp_path / "report")
    page = html.read_text()
    assert "data:image/webp;base64," in page and "data:image/png;base64," in page
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)  # in base64 those letters stand now and then
    for row in run:
        assert row.name.replace("'", "&#39;") in page and row.name in markdown.read_text()
    assert results.read(kept)[0].key == units[0].key


@pytest.mark.slow
@pytest.mark.usefixtures("less_drawn", "bases_from_disk")
def test_a_cut_run_goes_on_and_ends_with_the_same_table(tmp_path: Path, v_base: Path) -> None:
    """SIGKILL to a run with two processes; the second start repeats no finished unit and no finished training."""
    names = (BASE, "DreamBooth-LoRA", "B-LoRA")
    whole = table(list(grid.run(tiny(tmp_path / "whole", v_base, *names))))
    work = tmp_path / "cut"
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); import test_bench as t; from unbraid.bench import grid\n"
        "t.draw_less()\n"
        f"if __name__ == '__main__': list(grid.run(t.tiny(Path(sys.argv[1]), Path(sys.argv[2]), *{names!r}), 2))"
    )
    script = tmp_path / "go.py"
    script.write_text(code)
    arguments = [sys.executable, str(script), str(work), str(v_base), str(Path(__file__).parent)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 600
    while not list(work.glob("units/*separate-dreambooth*/unit.json")) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2.5)  # time for its workers to notice and exit
    finished = {
        file: file.stat().st_mtime_ns for file in [*work.glob("units/*/unit.json"), *work.glob("made/*/cost.json")]
    }
    assert finished
    again = list(grid.run(tiny(work, v_base, *names)))
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert table(again) == whole
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*.png")}
    assert table(list(grid.run(tiny(work, v_base, *names)))) == whole
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*.png")} == before, "a third start draws nothing"


@pytest.mark.slow
def test_units_made_elsewhere_are_done(tmp_path: Path, v_base: Path) -> None:
    first = [one.unit for one in grid.run(tiny(tmp_path / "a", v_base, BASE, task="combine")) if one.unit]
    known = results.read(results.save(first, tmp_path / "results.jsonl"))
    again = list(grid.run(tiny(tmp_path / "b", v_base, BASE, task="combine"), known=known))
    assert [one.unit for one in again] == known and not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("less_drawn")
def test_a_unit_that_fails_does_not_take_the_others_along(tmp_path: Path, v_base: Path) -> None:
    scale = replace(TINY, training={**FEW, "dreambooth": {"steps": 3, "rank": 4, "lr": 1e30}})
    todos = grid.plan(tmp_path, scale, chosen(("separate",), (BASE, "DreamBooth-LoRA")), str(v_base))
    done = {one.todo.row: one for one in grid.run(todos)}
    assert done[BASE].unit and done["DreamBooth-LoRA"].unit is None and "loss" in done["DreamBooth-LoRA"].error


@pytest.fixture(scope="module")
def sane(tmp_path_factory: pytest.TempPathFactory) -> list[Unit]:
    """The three sanity rows on the embedded base."""
    scale = replace(QUICK, others=2, steps=2)
    return [one.unit for one in grid.run(grid.plan(tmp_path_factory.mktemp("sane"), scale, sanity.ROWS)) if one.unit]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_ceiling_is_the_ceiling(sane: list[Unit], task: str) -> None:
    found = stats.problems(sane, task)
    for problem, values in found[CEILING].items():
        assert values["likeness"] > 0.9 and values["likeness"] > found[BASE][problem]["likeness"]
        assert values["distance"] < 0.2 and values["named"] == 1
        assert values["likeness"] > found[COPY][problem]["likeness"]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_copying_is_caught_by_the_leak(sane: list[Unit], task: str) -> None:
    found = stats.problems(sane, task)
    for problem, values in found[COPY].items():
        others = max(found[row][problem]["leak"] for row in (BASE, CEILING))
        assert values["leak"] > others
        if task in ("separate", "transfer"):
            assert values["leak"] == pytest.approx(1, abs=1e-4)


def test_the_medium_size_is_a_part_of_the_full_one() -> None:
    """Its units are those of the full size, so that a later full run repeats none of them."""
    rows = [row for row in all_rows() if row.task == "separate"][:2]
    medium, full = ({grid.key(todo) for todo in grid.plan(Path("unused"), size, rows)} for size in (MEDIUM, FULL))
    assert medium < full and len(medium) == 2 * 8
    shown = [cell for cell in cells(MEDIUM) if cell.task == "separate" and not cell.seed]
    assert [cell.subject for cell in shown] == list(MEDIUM.subjects)
    assert {cell.style.style for cell in shown} == set(FULL.styles)


def test_cells_come_seed_by_seed_and_ask_for_what_the_base_never_saw() -> None:
    seeds = [cell.seed for cell in cells(replace(FULL, seeds=(0, 1)))]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1}
    for cell in cells(FULL):
        for item in items(cell, FULL):
            assert item.truth.values.shape == (3, 128, 128)
            assert str(item.truth) not in {str(truth) for truth in item.leaks.values()}
    recombined = [cell for cell in cells(FULL) if cell.task == "recombine"]
    assert all(
        cell.content.subject != cell.style.subject and cell.content.style != cell.style.style for cell in recombined
    )


def test_a_key_depends_on_settings_and_scale(tmp_path: Path) -> None:
    (todo,) = grid.plan(tmp_path, QUICK, chosen(("separate",), ("UnZipLoRA",)))
    key = grid.key(todo)
    assert grid.key(todo) == key
    assert grid.key(replace(todo, scale=replace(QUICK, steps=3))) != key
    assert grid.key(replace(todo, cell=replace(todo.cell, seed=1))) != key


def test_a_training_is_made_anew_for_every_option_that_changes_it(tmp_path: Path) -> None:
    cache, picture = TrainingCache(tmp_path, QUICK), tmp_path / "in.png"
    Image.new("RGB", (128, 128), "red").save(picture)

    def key(**options: Any) -> str:
        return cache._key(split_job(picture, subject="fox", style="ink", **options))

    options: dict[str, Any] = {"resolution": 64, "schedule": "cosine", "warm_up": 5, "batch_size": 2, "alpha": 8.0}
    options |= {"templates": {"style": "{style} style"}, "blocks": "b-lora", "rank": 4, "seed": 1}
    keys = [key(), *(key(**{name: value}) for name, value in options.items())]
    assert len(set(keys)) == len(keys)


class Noted(TrainingCache):
    """Notes what is drawn with, in order; trains nothing."""

    every: tuple[tuple[Use, ...], ...] = ()

    def split(self, picture: Truth, method: str = "unziplora", **options: Any) -> Path:
        return self.work / str(picture)

    def learn(self, images: Path | list[Path], prompt: str, seed: int, **settings: Any) -> Path:
        return self.work / "lora.safetensors"

    def drawer(self, *uses: Use, **options: Any) -> Drawer:
        self.every = (*self.every, uses)
        return lambda item, seeds: []


@pytest.mark.parametrize(
    ("row", "task", "style", "apart"),
    [
        ("UnZipLoRA", "separate", OWN, False),
        ("UnZipLoRA", "recombine", STYLE_NAME, True),
        ("UnZipLoRA, official", "recombine", OWN, False),
        ("QR-LoRA, split", "recombine", STYLE_NAME, True),
        ("B-LoRA", "recombine", None, False),
        ("ablation: UnZipLoRA, own prompts", "recombine", OWN, False),
        ("ablation: UnZipLoRA, style words, all layers", "recombine", STYLE_NAME, False),
        ("ablation: UnZipLoRA, own prompts, layers by role", "recombine", OWN, True),
        ("DreamBooth-LoRAs, layers by role", "recombine", None, True),
    ],
)
def test_what_the_loras_of_a_split_read_and_where_they_act(
    tmp_path: Path, row: str, task: str, style: str | None, apart: bool
) -> None:
    (one,) = chosen((task,), (row,))
    cell = next(cell for cell in cells(FULL) if cell.task == task)
    cache = Noted(tmp_path, FULL)
    assert "both" in one.make(cache, cell, one.settings)
    assert [use.prompt for use in cache.every[-1]] == [style and OWN, style]
    left = TABLES["icons"].blocks
    assert [use.without for use in cache.every[-1]] == ([left["style"], left["content"]] if apart else [(), ()])


@pytest.mark.parametrize(
    ("row", "files"),
    [
        ("UnZipLoRA, layers by role", {"content": "content", "style": "style"}),
        ("DreamBooth-LoRA, layers by role", {"content": "lora", "style": "lora"}),
    ],
)
def test_what_was_learnt_from_one_picture_used_alone_by_role(tmp_path: Path, row: str, files: dict[str, str]) -> None:
    (one,) = chosen(("separate",), (row,))
    cache, left = Noted(tmp_path, FULL), TABLES["icons"].blocks
    drawers = one.make(cache, next(cells(FULL)), one.settings)
    assert set(drawers) == {"content", "style", "both"}
    alone = [(use.file.stem, use.without) for (use, *others) in cache.every if not others and use.without]
    assert alone == [(files["content"], left["style"]), (files["style"], left["content"])]
    whole = [{use.file.stem for use in uses} for uses in cache.every if not any(use.without for use in uses)]
    assert set(files.values()) in whole


# statistics


def unit(row: str, problem: str, seed: int, content: float, style: float) -> Unit:
    drawing = Drawing("both", "p", "fox", "line art", seed, "f.png", {"content": content, "style": style})
    cell = f"{problem}, seed {seed}"
    return Unit(f"{row}{cell}", "combine", row, cell, seed, (drawing,), None, cost.Cost(), {"truth": "t", "base": "b"})


def test_seeds_of_one_problem_are_one_value() -> None:
    units = [unit("a", "x", 0, 0.2, 0.2), unit("a", "x", 1, 0.6, 0.6), unit("a", "y", 0, 1.0, 1.0)]
    found = stats.problems(units, "combine")["a"]
    assert {problem: round(values["likeness"], 6) for problem, values in found.items()} == {"x": 0.4, "y": 1.0}
    assert stats.estimate([one["likeness"] for one in found.values()]).n == 2


def test_a_sheet_shows_the_first_seed_whose_pictures_are_there(tmp_path: Path) -> None:
    """Results that were made elsewhere have no pictures."""
    elsewhere, here = unit("a", "x", 0, 0.2, 0.2), unit("a", "x", 1, 0.6, 0.6)
    here = replace(here, drawings=(replace(here.drawings[0], file="here.png"),))
    sheet = tmp_path / "sheet.webp"
    assert plots.sheet([elsewhere], "combine", tmp_path, sheet) is None and not sheet.exists()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "here.png")
    assert plots.sheet([elsewhere, here], "combine", tmp_path, sheet) == sheet
    shown = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    assert ((shown[..., 0] > 200) & (shown[..., 1] < 60) & (shown[..., 2] < 60)).sum() > 1000


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        found = stats.estimate(rng.normal(0.5, 0.1, 24).tolist())
        assert found.low is not None and found.high is not None and found.low < found.mean < found.high
        covered += found.low <= 0.5 <= found.high
    assert 85 <= covered <= 100


def test_a_lead_is_paired() -> None:
    """Problems differ much more than rows, so only a paired test finds the lead."""
    rng = np.random.default_rng(1)
    level = rng.uniform(0.1, 0.9, 16)
    units = [unit("a", str(i), 0, x + 0.02 + 0.005 * rng.normal(), x) for i, x in enumerate(level)]
    units += [unit("b", str(i), 0, x, x) for i, x in enumerate(level)]
    units += [unit("c", str(i), 0, x + 0.005 * rng.normal(), x) for i, x in enumerate(level)]
    ahead, level_with = (stats.lead(units, "combine", row, "b", "content") for row in "ac")
    assert ahead and level_with
    assert ahead.p < 0.001 and ahead.ahead.mean == pytest.approx(0.02, abs=0.005)
    assert level_with.p > 0.05
    corrected = stats.holm([ahead, level_with])
    assert corrected[0].p == pytest.approx(min(1, 2 * ahead.p)) and corrected[1].p >= level_with.p
    assert stats.lead(units, "combine", "a", "nobody") is None


def test_intervals_and_p_values_do_not_depend_on_the_order_of_units_or_rows() -> None:
    rng = np.random.default_rng(2)
    units = [unit(row, str(i), 0, rng.uniform(), rng.uniform()) for i in range(12) for row in "ab"]
    one, other = stats.lead(units, "combine", "a", "b"), stats.lead(units, "combine", "b", "a")
    assert one and other and one == stats.lead(units[::-1], "combine", "a", "b")
    assert one.p == pytest.approx(other.p) and one.ahead.low == pytest.approx(-(other.ahead.high or 0))
    values = rng.uniform(size=9).tolist()
    assert str(stats.estimate(values)) == str(stats.estimate(values[::-1]))


def test_a_lead_of_one_use_counts_its_drawings_alone() -> None:
    units = [unit(row, "x", 0, 0.5 + gap, 0.5) for row, gap in (("a", 0.2), ("b", 0.0))]
    other = [replace(one.drawings[0], use="style LoRA", scores={"content": 0.5, "style": 0.1}) for one in units]
    units = [replace(one, drawings=(*one.drawings, more)) for one, more in zip(units, other, strict=True)]
    for use, expected in (("", 0.1), ("both", 0.2), ("style LoRA", 0.0)):
        found = stats.lead(units, "combine", "a", "b", "content", use)
        assert found and found.ahead.mean == pytest.approx(expected), use
    assert stats.lead(units, "combine", "a", "b", "content", "nothing") is None


def test_a_seed_that_only_one_of_two_rows_has_does_not_count() -> None:
    units = [unit("a", "x", 0, 0.5, 0.5), unit("b", "x", 0, 0.5, 0.5), unit("a", "x", 1, 0.9, 0.9)]
    found = stats.lead(units, "combine", "a", "b")
    assert found and found.ahead.mean == 0


def test_verdicts_follow_the_figures() -> None:
    def some(gap: float, n: int = 12) -> list[Unit]:
        return [
            unit(row, str(i), 0, 0.5 + x + i / 100, 0.5)
            for i in range(n)
            for row, x in (("ZipLoRA", gap), ("direct sum", 0))
        ]

    words = [claims.verdicts(some(gap))[0].word for gap in (0.1, -0.1)]
    assert words == ["holds", "reversed"]
    assert claims.verdicts(some(0.1, 3))[0].word == "undecided", "three problems prove nothing"


def test_claims_are_about_rows_that_exist() -> None:
    known = {(row.task, row.name) for row in all_rows()}
    assert all({(one.task, one.row), (one.task, one.other)} <= known for one in claims.CLAIMS)


def test_rows_are_compared_on_the_cells_that_all_have_done() -> None:
    units = [unit(row, problem, 0, 0.5, 0.5) for problem, rows in (("x", "ab"), ("y", "a")) for row in rows]
    assert [one.cell for one in results.complete(units)] == ["x, seed 0"] * 2
    apart = [unit("a", "x", 0, 0.5, 0.5), unit("b", "y", 0, 0.5, 0.5)]
    assert results.complete(apart) == apart, "no cell is complete: all there is"


def test_a_report_compares_two_rows_on_all_problems_that_both_have(tmp_path: Path) -> None:
    had = {
        "a": {"w": 0.9, "x": 0.9, "y": 0.1, "z": 0.1},
        "b": {"w": 0.5, "x": 0.5, "y": 0.9},
        "c": {"w": 0.2, "x": 0.2},
    }
    units = [unit(row, problem, 0, value, value) for row, some in had.items() for problem, value in some.items()]
    text = report.write(units, len(units), tmp_path, tmp_path / "report")[1].read_text()
    means, leads = (text.split("\n\n")[i].splitlines() for i in (2, 3))
    assert [line.split(" | ")[-1] for line in means[2:]] == ["2 |"] * 3, "means: the problems that all have"
    assert leads[0].startswith("| a ahead of"), "the best there, not over its own problems"
    assert {line.split(" | ")[0][2:]: line.split(" | ")[2] for line in leads[2:]} == {"b": "2 of 3", "c": "2 of 2"}


def test_a_report_compares_every_row_with_a_named_one(tmp_path: Path) -> None:
    had = {"a": {"x": 0.9, "y": 0.1}, "b": {"x": 0.5, "y": 0.9}, "c": {"x": 0.2}}
    units = [unit(row, problem, 0, value, value) for row, some in had.items() for problem, value in some.items()]
    units += [unit(COPY, "x", 0, 0.9, 0.9)]
    html, _, leads, _ = report.write(units, len(units), tmp_path, tmp_path / "report", ["c"])
    lines = leads.read_text().splitlines()
    assert "| b | likeness | 0.500 | 0.200 | 0.300 | 1 of 1 | 1.000 | 1.000 |" in lines
    assert f"| {COPY} | likeness | 0.900 | 0.200 | 0.700 | 1 of 1 | 1.000 | – |" in lines, "not corrected for"
    assert {line.split(" | ")[0][2:] for line in lines if " | content | " in line} == {"a", "b", COPY}
    assert "Each row against c" in html.read_text()
    report.write(units, len(units), tmp_path, tmp_path / "report")
    assert not leads.exists(), "it would be of other units"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--over", "direct sun"], "Did you mean 'direct sum'?"),
        (["--task", "separate", "--over", "direct sum"], "'direct sum' is not among those chosen"),
        (["--over", "ablation: both at 0.75"], "--only all"),
        (["--images", ".", "--over", "direct sum"], "no true answers to compare by"),
    ],
)
def test_a_row_to_compare_with_is_one_of_the_report(words: list[str], what: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--report", "--work", str(tmp_path), *words])
    assert done.exit_code and what in str(done.exception), done.output


def test_a_row_to_compare_with_has_units(tmp_path: Path) -> None:
    known = DOCS.parent / "benchmark" / "results.jsonl"
    never_run = "ablation: Break-for-Make, fine-tuned by AdamW"
    words = ["--full", "--task", "combine", "--only", BASE, "--only", never_run, "--over", never_run]
    done = CliRunner().invoke(app, ["bench", "--report", "--work", str(tmp_path), "--results", str(known), *words])
    assert "no unit of this row is there" in str(done.exception) and (tmp_path / "report" / "table.md").exists()


def test_all_rows_are_chosen_with_their_ablations() -> None:
    assert chosen(("combine",), ("all",)) == [row for row in all_rows() if row.task == "combine"]
    assert any(row.ablation for row in chosen((), ("all",))) and not any(row.ablation for row in chosen())


@pytest.mark.parametrize(
    ("given", "seeds"), [([], (0,)), (["--seed", "1"], (1,)), (["--seed", "1", "--seed", "0", "--seed", "1"], (1, 0))]
)
def test_seeds_are_those_given_once_each(
    given: list[str], seeds: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(grid, "plan", lambda work, scale, *rest: seen.append(scale.seeds) or [])
    CliRunner().invoke(app, ["bench", "--report", "--work", str(tmp_path), *given])
    assert seen == [seeds]


# rows of other packages, bad input


def example(word: str) -> str:
    """The example of docs/benchmark.md in which a word stands."""
    return next(code for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if word in code)


def committed(name: str) -> str:
    return (DOCS.parent / "benchmark" / name).read_text()


def figures(text: str) -> set[str]:
    """All means with an interval; a minus sign like a hyphen."""
    number = r"-?\d\.\d{3}"
    return set(re.findall(rf"(?<![\d.]){number} \[{number}, {number}\]", text.replace("−", "-")))


def the_other_way_round(figure: str) -> str:
    """By how much the second row is ahead of the first, if this is by how much the first is ahead of the second."""
    mean, low, high = (one[1:] if one[0] == "-" else f"-{one}" for one in re.findall(r"-?[\d.]+", figure))
    return f"{mean} [{high}, {low}]"


def test_the_figures_of_the_docs_are_in_the_committed_tables() -> None:
    known = figures(committed("table.md")) | figures(committed("leads.md"))
    said = DOCS.read_text().split("## Results")[1].split("## A row of your own")[0]
    assert len(figures(said)) > 100 and not figures(said) - known - set(map(the_other_way_round, known))
    parts = re.split(r"^## ", committed("table.md") + committed("leads.md"), flags=re.M)
    names = {row.name for row in all_rows()}
    for line in said.splitlines():
        row, *cells = line.replace("*", "").replace(" (ceiling)", "").strip("| ").split(" | ")
        if line.startswith("| ") and row in names:
            figure = next(cell for cell in cells if re.search(r"\d", cell)).replace("−", "-")
            against = [
                one for part in parts if part.split("\n")[0].endswith(f": against {row}") for one in part.splitlines()
            ]
            own = [one for part in parts for one in part.splitlines() if one.startswith(f"| {row} | ")]
            assert any(figure in one.replace("*", "") for one in own + against), line


def test_the_committed_tables_are_those_of_the_committed_units() -> None:
    units, names = results.read(DOCS.parent / "benchmark" / "results.jsonl"), {row.name for row in chosen()}
    usual = [one for one in units if one.row in names]
    for task in TASKS:
        assert tables.scores(results.complete(usual), task).markdown in committed("table.md"), task
    assert tables.claims(claims.verdicts(usual)).markdown in committed("table.md")
    rows = tables.order(stats.problems(results.complete(units), "transfer"))
    assert tables.over(units, "transfer", rows, "Pair").markdown in committed("leads.md")
    for part in re.split(r"^## ", committed("leads.md"), flags=re.M)[1:]:
        task, other = part.split("\n")[0].split(": against ")
        lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
        for line in lines[:: len(lines) // 2]:
            row, measured, *given = line.strip("| ").split(" | ")
            use, metric = re.fullmatch(r"(?:(.*): )?(\w+)", measured).groups()  # pyright: ignore[reportOptionalMemberAccess]
            found = stats.lead(units, task, row, other, metric, use or "")
            assert found, line
            wins = f"{found.wins} of {found.ahead.n}"
            assert given[:5] == [*map(str, (found.mine, found.theirs, found.ahead)), wins, tables._p(found)]


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example of docs/benchmark.md, installed as a package with an entry point."""
    code = example("ROWS")
    (point,) = re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.S)
    place = tmp_path / "site"
    info = place / "my_bench-1.dist-info"
    info.mkdir(parents=True)
    (place / "my_bench.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-bench\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        point.replace('project.entry-points."', "").replace('"]', "]").replace('"', "")
    )
    monkeypatch.syspath_prepend(str(place))
    yield place
    sys.modules.pop("my_bench", None)
    grid._rows.cache_clear()


@pytest.mark.slow
def test_a_row_of_another_package_joins(
    foreign: Path, tmp_path: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid._rows.cache_clear()
    assert len((foreign / "my_bench.py").read_text().splitlines()) <= 30
    todos = tiny(tmp_path, v_base, "softer sum", "direct sum")
    done = {one.todo.row: one.unit for one in grid.run(todos)}
    mine, plain = done["softer sum"], done["direct sum"]
    assert mine and plain and mine.drawings[0].scores != plain.drawings[0].scores
    key = grid.key(todos[-1])
    with monkeypatch.context() as patch:
        patch.setitem(grid._rows(), ("combine", "softer sum"), replace(grid._row(todos[-1]), version=2))
        assert grid.key(todos[-1]) != key


def test_what_is_no_row_is_refused(foreign: Path) -> None:
    (foreign / "my_bench.py").write_text("ROWS = [1]\n")
    with pytest.raises(UsageError, match="int is not a Row"):
        registry.all_rows()


def test_a_row_may_draw_as_it_likes(tmp_path: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    white = Row(
        "combine", "white", lambda *_: {"both": lambda item, seeds: [Image.new("RGB", (64, 64), "white")] * len(seeds)}
    )
    monkeypatch.setattr(registry, "ROWS", [white])
    grid._rows.cache_clear()
    (done,) = grid.run(tiny(tmp_path, v_base, "white"))
    grid._rows.cache_clear()
    assert done.unit and done.unit.drawings[0].scores["distance"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "paint"], "there is no task 'paint'"),
        (["--only", "ZipLorra"], "there is no row 'ZipLorra'. Did you mean 'ZipLoRA'?"),
        (["--report"], "there is nothing to report"),
        (["--results", "no.jsonl"], "no.jsonl"),
        (["--clip", "a/b"], "nothing to measure"),
        (["--processes", "-1"], "-1 processes"),
        (["--gpus", "1"], "--gpus: goes with --ray"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["unbraid", "bench", "--work", str(tmp_path / "w"), *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().err.strip()
    assert end.value.code == 1 and expected in printed and len(printed.splitlines()) == 1


def test_damaged_results_are_named(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps({"task": "combine"}) + "\n")
    with pytest.raises(UsageError, match="line 1"):
        results.read(file)


@pytest.mark.slow
@pytest.mark.usefixtures("less_drawn")
def test_the_command_runs_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`unbraid bench --quick` on the embedded base, with rows that are not trained."""
    monkeypatch.setattr(
        "unbraid.bench.truth.tasks.QUICK", Scale(("fox",), ("line art",), ("stencil",), others=1, steps=2)
    )
    rows = [argument for row in (BASE, COPY) for argument in ("--only", row)]
    arguments = ["--work", str(tmp_path), "--processes", "1", "--quiet", *rows]
    monkeypatch.setattr(sys, "argv", ["unbraid", "bench", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == ["report.html", "table.md", "results.jsonl"]


def test_flops_grow_with_steps_and_truth_is_itself(tmp_path: Path, v_base: Path) -> None:
    from unbraid.runs.api import learn_job

    picture = tmp_path / "fox.png"
    Truth("fox", "line art").image.save(picture)
    costs = [cost.counted(learn_job(picture, prompt="a fox", base=str(v_base), rank=4, steps=n)) for n in (2, 6)]
    assert costs[1].flops == pytest.approx(3 * costs[0].flops) and costs[0].parameters == costs[1].parameters > 0


def test_flops_of_a_step_are_counted_at_its_place(tmp_path: Path, v_base: Path) -> None:
    """UnZipLoRA's hooks go by the step: in the further steps, the content has no gradients."""
    from unbraid.runs.api import split_job

    picture = tmp_path / "fox.png"
    Truth("fox", "line art").image.save(picture)
    few: dict[str, Any] = FEW["unziplora"]
    plain, longer = (
        cost.counted(split_job(picture, subject="fox", style="line art", base=str(v_base), style_steps=more, **few))
        for more in (0, 3)
    )
    assert longer.flops > 1.5 * plain.flops
