"""`unbraid grid`: job folders, shares, several workers, the report."""

import csv
import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_run import cli_in_process

import unbraid
from unbraid.bench.field.grid_scores import score_runs
from unbraid.bench.field.models import FieldModels
from unbraid.bench.truth.scores import harmonic
from unbraid.cli import grid_file
from unbraid.common.errors import UsageError
from unbraid.core.recipe import ForwardRequest, TrainingCoroutine
from unbraid.core.train import run_one
from unbraid.runs import folder, grid_report, grid_worker, job_folder
from unbraid.runs.batch import finder, recorded
from unbraid.runs.grid_worker import run_once, share
from unbraid.runs.job import Job, Progress
from unbraid.runs.job_folder import DONE, state, write_job
from unbraid.runs.lease import AtWorkError, take
from unbraid.runs.run import run, script


def job(out: Path, base: Path, picture: Path, seed: int = 0, previews: int = 0) -> Job:
    given = {"rank": 2, "steps": 3, "lr": 1e-3, "base": str(base), "previews": previews}
    return unbraid.learn_job(picture, prompt="a sks cat", seed=seed, out=out, **given)


def same(one: Path, other: Path) -> None:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in other.glob("*.safetensors"))
    for name in files:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
@pytest.mark.usefixtures("bases_from_disk")
def test_jobs_equal_plain_runs_and_are_done_once(v_base: Path, picture: Path, tmp_path: Path) -> None:
    jobs = [job(tmp_path / "grid" / str(i), v_base, picture, i) for i in range(3)]
    assert unbraid.grid(jobs[:2], shard="1/2", device="cpu") == [jobs[1].out]
    assert not jobs[0].out.exists(), "that one is the other worker's"
    assert unbraid.grid(jobs, device="cpu") == [one.out for one in jobs]
    for i, one in enumerate(jobs):
        list(run(job(tmp_path / f"plain{i}", v_base, picture, i), device="cpu"))
        same(one.out, tmp_path / f"plain{i}")
        assert state(one.out) == "done" and not [*one.out.glob(".*")]
        assert not (tmp_path / f"plain{i}" / DONE).exists(), "other run folders are as they were"
        figures = job_folder.read_done(one.out)
        assert figures["steps"] == 3 and figures["seconds"] > 0 and figures["loss"] > 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("*")}
    unbraid.grid(jobs, device="cpu")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("*")}
    with pytest.raises(UsageError, match="the job in this folder is another one: seed"):
        unbraid.grid([replace(jobs[0], seed=9)])


def test_a_job_folder_can_be_moved_on_by_batch(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """Every way to run it goes through the same code: it is leased, and marked as done."""
    todo = job(tmp_path / "a", v_base, picture)
    write_job(todo)
    assert state(todo.out) == "waiting" and recorded(todo.out / folder.JOB).settings == todo.settings
    unbraid.batch([recorded(todo.out / folder.JOB)], device="cpu")
    assert state(todo.out) == "done"


def test_another_machines_job_is_left_until_its_lease_expires(v_base: Path, picture: Path, tmp_path: Path) -> None:
    todo = job(tmp_path / "a", v_base, picture)
    write_job(todo)
    lease = take(todo.out, "another machine")
    find = finder("cpu")
    (event,) = run_once([todo.out], 1, find)
    assert event.held and state(todo.out) == "at work" and not (todo.out / folder.RECORD).exists()
    os.utime(lease.path, (0, 0))
    assert [event.done for event in run_once([todo.out], 1, find)][-1] and not lease.held()


def test_a_worker_that_lost_its_lease_writes_nothing_more(v_base: Path, picture: Path, tmp_path: Path) -> None:
    todo = job(tmp_path / "a", v_base, picture)
    write_job(todo)
    training = script(todo, False, finder("cpu"))
    while not isinstance(next(training), ForwardRequest):
        pass
    (old,) = todo.out.glob(".lease-1")
    os.utime(old, (0, 0))
    other = take(todo.out, "another machine")
    before = {path.name: path.stat().st_mtime_ns for path in todo.out.iterdir()}
    with pytest.raises(AtWorkError, match="may have taken this run over"):
        training.send([])
    after = {path.name: path.stat().st_mtime_ns for path in todo.out.iterdir()}
    assert {**after, folder.LOCK: 0} == {**before, folder.LOCK: 0} and other.held()
    assert lease_of(todo.out) == "another machine"


def lease_of(out: Path) -> str:
    (path,) = out.glob(".lease-*")
    return json.loads(path.read_text())["machine"]


def test_a_run_that_fails_is_told_and_tried_again(v_base: Path, picture: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    mine.write_bytes(picture.read_bytes())
    jobs = [job(tmp_path / "bad", v_base, mine), job(tmp_path / "good", v_base, picture)]
    for one in jobs:
        write_job(one)
    Image.open(picture).rotate(90).save(mine)
    ended = {event.folder: event for event in run_once([one.out for one in jobs], 1, finder("cpu"))}
    assert "no longer what job.toml says: image" in str(ended[jobs[0].out].error) and ended[jobs[1].out].done
    assert [state(one.out) for one in jobs] == ["failed", "done"]
    assert "no longer what" in (jobs[0].out / job_folder.FAILED).read_text()
    mine.write_bytes(picture.read_bytes())
    unbraid.grid(jobs, device="cpu")
    assert state(jobs[0].out) == "done" and not (jobs[0].out / job_folder.FAILED).exists()
    broken = replace(jobs[0], out=tmp_path / "nan", settings={**jobs[0].settings, "lr": 1e30, "steps": 5})
    with pytest.raises(UsageError, match=r"1 of 2 runs failed.*the loss is nan"):
        unbraid.grid([broken, jobs[1]], device="cpu")


def test_a_full_card_fails_one_job_and_says_what_saves_memory(
    v_base: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [job(tmp_path / name, v_base, picture) for name in ("large", "small")]
    for one in jobs:
        write_job(one)
    calls = list[int]()

    def full_once(training: TrainingCoroutine[Progress], at_once: int) -> Iterator[Progress]:
        calls.append(at_once)
        for event in run_one(training, at_once):
            yield event
            if len(calls) == 1 and event.step:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(grid_worker, "run_one", full_once)
    ended = {event.folder: event for event in run_once([one.out for one in jobs], 1, finder("cpu"))}
    assert "--vram max: the device's memory is full" in str(ended[jobs[0].out].error) and ended[jobs[1].out].done
    assert calls == [jobs[0].loading.preset.at_once] * 2 and state(jobs[0].out) == "failed"
    assert not [*jobs[0].out.glob(".lease-*")], "another worker can have it at once"


@pytest.mark.slow
def test_the_command_line(v_base: Path, picture: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "small.toml", tmp_path / "grids"
    file.write_text(
        f'verb = "learn"\nbase = "{v_base}"\nprompt = "a sks cat"\nout = "{out}"\nseeds = [0, 1]\n'
        f'[[pictures]]\nimages = "{picture}"\npreviews = 1\n[settings]\nrank = [1, 2]\nsteps = 2\n'
    )
    code, text = cli_in_process(["grid", str(file), "--quiet", "--shard", "0/2"])
    assert code == 0 and len(job_folder.folders(out)) == 2, text
    assert cli_in_process(["grid", str(file), "--quiet"]) == (0, "")
    assert cli_in_process(["grid", str(out), "--quiet"]) == (0, ""), "a folder of job folders"
    report = grid_report.report(out, tmp_path / "report", "-loss")
    assert len(report) == 5 and report[3].startswith("loss ") and "(mean of 2): dreambooth rank=" in report[3]
    assert all((tmp_path / "report" / name).exists() for name in (grid_report.SHEETS, grid_report.CURVES))
    with (tmp_path / "report" / grid_report.TABLE).open() as table:
        rows = list(csv.DictReader(table))
    assert {(row["seed"], row["settings.rank"], row["state"]) for row in rows} == {
        (seed, rank, "done") for seed in "01" for rank in "12"
    }
    assert all(float(row["loss"]) > 0 and row["steps"] == "2" and row["words.prompt"] == "a sks cat" for row in rows)
    (out / "damaged").mkdir()
    (out / "damaged" / folder.JOB).write_text("method = ")
    assert grid_report.rows(out)[-1] == {"run": "damaged", "state": "damaged"}
    code, text = cli_in_process(["grid", "report", str(out), "--by", "los"])
    assert code == 1 and "Did you mean 'loss'" in text and len(text.strip().splitlines()) == 1
    assert cli_in_process(["grid", "report", str(tmp_path)])[1].count("there are no job folders here") == 1


GOOD = "verb = 'learn'\nprompt = 'a cat'\n[[pictures]]\nimages = 'IMAGE'\n"


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("verb = 'learn'", "there are no pictures in it"),
        ("prompt = 'a cat'\n[[pictures]]\nimages = 'IMAGE'", "there is no training verb None"),
        ("seeds = 3\n" + GOOD, "'seeds' is no list of numbers"),
        ("seeds = [true]\n" + GOOD, "'seeds' is no list of numbers"),
        ("seeds = [1, 1]\n" + GOOD, "1 runs come twice"),
        ("methods = 'dreambooth'\n" + GOOD, "'methods' is no list of names"),
        ("methods = ['dreambath']\n" + GOOD, "dreambath"),
        ("method = 'dreambooth'\n" + GOOD, "Give 'methods' at the top"),
        ("promt = 'x'\n" + GOOD, "learn has no 'promt'. Did you mean 'prompt'"),
        (GOOD + "seed = 3", "Give 'seeds' at the top"),
        (GOOD + "[settings]\nrnak = [1, 2]", "Did you mean 'rank'"),
        (GOOD + "[settings.dreambooth]\nrank = [1, 2]", "which is none of the methods"),
        (GOOD + f"[settings]\nrank = {[*range(1, 400)]}\nsteps = {[*range(1, 400)]}", "more than 100000 runs"),
        ("verb = ", "not a TOML file"),
        (GOOD + "[[pictures]]\nimages = 'nothing.png'", "nothing.png"),
        ("optimizer = 'adamwx'\n" + GOOD, "Did you mean 'adamw'"),
        ("swap = 999\n" + GOOD, "999 blocks cannot be swapped"),
        ("swap = -1\n" + GOOD, "-1 blocks cannot be swapped"),
        ("timesteps = 'logit-normal'\n" + GOOD, "--timesteps: this base is trained with uniform timesteps"),
        ("prediction = 'x'\n" + GOOD, "--prediction: there is no prediction type 'x'"),
        ("vae = 'no/such/vae'\n" + GOOD, "no/such/vae: there is no such VAE"),
        ("parts = 'no/such/parts'\n" + GOOD, "--parts: goes with a single file"),
        ("template = ['both=a {sujet}']\n" + GOOD, "there is no word {sujet}"),
    ],
)
def test_bad_files_are_one_line(table: str, what: str, picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(table.replace("IMAGE", str(picture)))
    code, text = cli_in_process(["grid", str(file), "--out", str(tmp_path / "out")])
    assert code == 1 and what in text and len(text.strip().splitlines()) == 1, text
    assert [path.name for path in tmp_path.iterdir()] == ["grid.toml"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--gpus", "0.5"), "--gpus: goes with --ray"),
        (("--judge",), "these options go with `report`"),
        (("--by", "loss"), "these options go with `report`"),
    ],
)
def test_options_of_something_else_are_told(options: tuple[str, ...], what: str, picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(GOOD.replace("IMAGE", str(picture)))
    code, text = cli_in_process(["grid", str(file), "--out", str(tmp_path / "out"), *options])
    assert code == 1 and what in text and len(text.strip().splitlines()) == 1, text
    assert [path.name for path in tmp_path.iterdir()] == ["grid.toml"]


def test_the_example_of_the_help(tmp_path: Path) -> None:
    file = tmp_path / "foxes.toml"
    file.write_text(grid_file.EXAMPLE)
    out, runs = grid_file.read(file)
    assert out == Path("grids/foxes") and len(runs) == 2 * 2 * (2 * 2 + 2) and len({run.name for run in runs}) == 24
    assert all("set" in run.table and run.table["verb"] == "split" for run in runs)
    for name in ("fox.png", "owl.png"):
        Image.new("RGB", (32, 32), "orange").save(tmp_path / name)
    moved = file.read_text().replace('"fox.png"', f'"{tmp_path}/fox.png"').replace('"owl.png"', f'"{tmp_path}/owl.png"')
    file.write_text(moved)
    jobs = [grid_file.job(run, tmp_path, file) for run in grid_file.read(file)[1]]
    assert {(one.method, one.settings["rank"]) for one in jobs} == {
        (method, rank) for method in ("unziplora", "blora") for rank in (16, 64)
    }
    more = moved.replace("rank = [16, 64]", "rank = [16, 64, 128]")
    file.write_text(more)
    assert {run.name for run in grid_file.read(file)[1]} > {one.out.name for one in jobs}, (
        "names stay when values are added"
    )
    assert tomllib.loads(more)


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/2/3", "/", "1/0"])
def test_bad_shares_are_told(text: str) -> None:
    with pytest.raises(UsageError, match="is no share of the jobs"):
        share(text)


def test_shares_are_every_nth() -> None:
    assert share("") == (0, 1) and share("2/3") == (2, 3)


@pytest.mark.slow
def test_the_best_settings_by_the_judge(v_base: Path, picture: Path, tmp_path: Path) -> None:
    given = {"base": str(v_base), "previews": 0, "rank": 2, "steps": 2, "window": 1}
    jobs = [
        unbraid.split_job(picture, subject="cat", style="line", out=tmp_path / f"{lr}", content_lr=lr, **given)
        for lr in (1e-3, 1e-2)
    ]
    unbraid.grid(jobs, device="cpu")
    assert list(score_runs([one.out for one in jobs], FieldModels(), by_judge=True)) == [one.out for one in jobs]
    rows = grid_report.rows(tmp_path)
    for row in rows:
        content, style = row["score.judge content"], row["score.judge style"]
        assert -1 <= content <= 1 and row["score.judge"] == harmonic(content, style)
    best = max(rows, key=lambda row: row["score.judge"])
    assert any(
        line.startswith(f"score.judge {best['score.judge']:.4g} (mean of 1): unziplora content_lr={best['run']}")
        for line in grid_report.report(tmp_path, tmp_path / "report")[2:3]
    )
    file = jobs[0].out / grid_report.SCORES
    before = file.stat().st_mtime_ns
    assert len(list(score_runs([jobs[0].out], FieldModels(), by_judge=True))) == 1
    assert file.stat().st_mtime_ns == before, "what is scored is not drawn again"
