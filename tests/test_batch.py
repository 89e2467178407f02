"""`unbraid batch`: runs together equal the same runs alone, and a failing run is reported in one line."""

import errno
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_run import called_in_process, cli_in_process

import unbraid
from unbraid.cli.batch import read
from unbraid.common.errors import UsageError
from unbraid.runs.api import learn_job, pair_job, split_job, zip_job
from unbraid.runs.batch import recorded, run_many
from unbraid.runs.folder import JOB
from unbraid.runs.job import Job
from unbraid.runs.job_folder import DONE, read_failed, read_job, state, write_job
from unbraid.runs.run import run

SPLIT = {"rank": 4, "steps": 4, "window": 1, "content_lr": 1e-3, "style_lr": 1e-3}


@pytest.fixture
def pictures(picture: Path, tmp_path: Path) -> list[Path]:
    """A square, a wide and a tall one."""
    files = []
    for i, size in enumerate(((48, 48), (64, 32), (32, 64))):
        files.append(tmp_path / f"picture{i}.png")
        Image.open(picture).resize(size).rotate(20 * i).save(files[-1])
    return files


def jobs(out: Path, base: Path, pictures: list[Path]) -> list[Job]:
    """Two splits, a pair and a LoRA, with different shapes, seeds and lengths."""
    common: dict[str, Any] = {"base": str(base), "previews": 0}
    words = {"subject": "cat", "style": "line"}
    longer: dict[str, Any] = {**SPLIT, "steps": 6}
    after = pictures[0].with_name("other.png")
    Image.open(pictures[0]).convert("L").save(after)
    return [
        split_job(pictures[0], **words, out=out / "a", seed=1, **common, **SPLIT),
        split_job(pictures[1], **words, out=out / "b", seed=2, **common, **longer),
        pair_job(pictures[0], after, **words, out=out / "c", rank=4, steps=3, style_from=1, lr=1e-3, **common),
        learn_job(pictures[2], prompt="a sks cat", out=out / "d", rank=2, steps=3, **common),
    ]


def same(one: Path, other: Path) -> None:
    """Check that LoRAs are the same up to rounding. AdamW can turn a gradient that is only rounding into a full step."""
    alone, batched = ({path.name for path in where.iterdir()} for where in (one, other))
    assert batched - alone in (set(), {JOB, DONE}), "a batch's runs are job folders"
    assert (one / "run.toml").read_text() == (other / "run.toml").read_text()
    for path in one.glob("*.safetensors"):
        first, second = load_file(path), load_file(other / path.name)
        assert first.keys() == second.keys()
        a, b = (torch.cat([value.flatten().float() for value in some.values()]) for some in (first, second))
        assert (a - b).norm() < 5e-4 * a.norm(), path


def test_jobs_are_written_first_and_say_at_last_how_they_ended(
    v_base: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """One contract with grids: job.toml, then the run, then `done` or `failed`, all under a lease."""
    good, bad = jobs(tmp_path, v_base, pictures)[:2]
    lost = pictures[0].with_name("lost.png")
    lost.write_bytes(pictures[1].read_bytes())
    bad = replace(bad, data=replace(bad.data, images=dict.fromkeys(bad.data.images, (lost,))))
    events = run_many([good, bad], 1, device="cpu")
    assert [state(one.out) for one in (good, bad)] == ["waiting", "waiting"] and recorded(good.out / JOB) == good
    next(events)
    assert state(good.out) == "at work"
    lost.unlink()
    told = [event for _, event in events if isinstance(event, UsageError)]
    assert [state(one.out) for one in (good, bad)] == ["done", "failed"]
    assert len(told) == 1 and read_failed(bad.out) == str(told[0])
    other = replace(bad, seed=9, data=good.data)
    assert not [event for _, event in run_many([good, other], 1, True, "cpu") if isinstance(event, UsageError)]
    assert read_job(bad.out)["seed"] == 9 and state(bad.out) == "done", "what has not begun may be another job"
    with pytest.raises(UsageError, match="the job in this folder is another one: seed"):
        write_job(replace(other, seed=10))


def test_a_disk_without_hard_links_does_for_a_batch(
    v_base: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    (one, *_) = jobs(tmp_path, v_base, pictures)
    unbraid.batch([one], device="cpu")
    assert state(one.out) == "done"
    with pytest.raises(UsageError, match="a mounted bucket has no hard links"):
        unbraid.grid([replace(one, out=tmp_path / "grid")], device="cpu")


@pytest.mark.slow
def test_runs_together_equal_runs_alone(v_base: Path, pictures: list[Path], tmp_path: Path) -> None:
    for job in jobs(tmp_path / "alone", v_base, pictures):
        list(run(job, device="cpu"))
    loras = [tmp_path / "alone" / name / "content.safetensors" for name in "ab"]
    zipped = [
        zip_job(*loras, out=tmp_path / name / "z", base=str(v_base), previews=0, steps=2) for name in ("alone", "many")
    ]
    list(run(zipped[0], device="cpu"))
    many = [*jobs(tmp_path / "many", v_base, pictures), zipped[1]]
    assert unbraid.batch(many, device="cpu") == [job.out for job in many]
    for name in "abcdz":
        same(tmp_path / "alone" / name, tmp_path / "many" / name)


@pytest.mark.slow
def test_previews_are_drawn_by_each_run_alone(v_base: Path, picture: Path, tmp_path: Path) -> None:
    def job(out: str, seed: int) -> Job:
        options = {**SPLIT, "steps": 4, "base": str(v_base), "previews": 2, "seed": seed}
        return split_job(picture, subject="cat", style="line", out=tmp_path / out, **options)

    list(run(job("alone", 0), device="cpu"))
    unbraid.batch([job("many", 0), job("other", 1)], device="cpu")
    for name in ("sheet.png", "previews/step_000002.png", "previews/step_000004.png"):
        one, two, other = (Image.open(tmp_path / folder / name).convert("L") for folder in ("alone", "many", "other"))
        pixels = [torch.tensor(list(image.tobytes()), dtype=torch.float) for image in (one, two, other)]
        assert (pixels[0] - pixels[1]).abs().max() <= 2, "but for rounding"
        assert (pixels[0] - pixels[2]).abs().max() > 2, "and the other run's are not the same"


@pytest.mark.slow
def test_a_run_that_fails_is_one_line(v_base: Path, pictures: list[Path], tmp_path: Path) -> None:
    table = f"""
base = {str(v_base)!r}
previews = 0
subject = "cat"
style = "line"
[[run]]
verb = "split"
image = {str(pictures[0])!r}
out = {str(tmp_path / "good")!r}
set = {{ rank = 4, steps = 3, window = 1 }}
[[run]]
verb = "split"
image = {str(pictures[1])!r}
out = {str(tmp_path / "nan")!r}
seed = 3
[run.set]
rank = 4
steps = 4
window = 1
content_lr = 1e30
[[run]]
verb = "learn"
images = [{str(tmp_path / "none.png")!r}]
prompt = "a sks cat"
out = {str(tmp_path / "none")!r}
"""
    file = tmp_path / "runs.toml"
    file.write_text(table)
    code, text = cli_in_process(["batch", str(file), "--quiet"])
    lines = text.strip().splitlines()
    assert code == 1 and len(lines) == 3 and "2 of 3 runs failed" in lines[2]
    assert any("no such image" in line for line in lines[:2]) and any("the loss is nan" in line for line in lines[:2])
    assert (tmp_path / "good" / "style.safetensors").exists() and not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="2 of 3 runs failed"):
        unbraid.batch(read(file), resume=True, device="cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("bases_from_disk")
def test_killed_and_resumed(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """SIGKILL while some runs train and others wait; finished runs are not changed."""
    run_tables = "".join(
        f"[[run]]\nverb = 'split'\nout = {str(tmp_path / 'OUT' / str(i))!r}\nseed = {i}\n"
        f"set = {{ rank = 4, steps = {steps}, window = 1 }}\n"
        for i, steps in enumerate((2, 8, 8, 3))
    )
    common = f"base = {str(v_base)!r}\nprevious = 0\nimage = {str(picture)!r}\nsubject = 'cat'\nstyle = 'line'\n"
    files = {}
    for name in ("whole", "cut"):
        files[name] = tmp_path / f"{name}.toml"
        files[name].write_text((common + run_tables).replace("OUT", name).replace("previous", "previews"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    script = "import unbraid.runs.pace; unbraid.runs.pace.SAVE_EVERY = 0.3; from unbraid.cli.main import main; main()"
    command = ["batch", "--quiet", "--at-once", "3"]
    code, printed, errors = called_in_process([*command, str(files["whole"])])
    assert code == 0 and len(printed.splitlines()) == 8, errors
    told = [sys.executable, "-c", script, *command, str(files["cut"])]
    process = subprocess.Popen(told, env=environment, stdout=subprocess.DEVNULL)
    deadline, cut = time.monotonic() + 600, tmp_path / "cut"
    while not ((cut / "1" / "state.safetensors").exists() and finished(cut / "0")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must still be going when it is killed"
    before = (cut / "0" / "style.safetensors").stat().st_mtime_ns
    code, text = cli_in_process([*command, str(files["cut"]), "--resume"])
    assert code == 0, text
    assert (cut / "0" / "style.safetensors").stat().st_mtime_ns == before
    for i in range(4):
        same(tmp_path / "whole" / str(i), cut / str(i))


def finished(folder: Path) -> bool:
    return (folder / "loss.png").exists() and not (folder / "state.safetensors").exists()


@pytest.mark.slow
def test_run_toml_is_a_run_of_a_batch(v_base: Path, pictures: list[Path], tmp_path: Path) -> None:
    todo = jobs(tmp_path / "r", v_base, pictures)
    for job in todo:
        steps = run(job, device="cpu")
        next(steps)
        steps.close()  # type: ignore[attr-defined]
        assert recorded(job.out / "run.toml") == job
    files = [str(job.out / "run.toml") for job in todo]
    code, text = cli_in_process(["batch", *files, "--quiet"])
    assert code == 1 and "4 of 4 runs have been begun already. Add --resume" in text and len(text.splitlines()) == 1
    assert cli_in_process(["batch", *files, "--quiet", "--resume"])[0] == 0
    assert all((job.out / "loss.png").exists() for job in todo)


@pytest.mark.slow
def test_more_memory_is_not_taken_than_there_is(
    v_base: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --at-once, the first step of the first run decides how many fit: with half the memory, half as many."""
    from unbraid.core import many

    counts = []
    for share in (0.5, 1e-9):
        monkeypatch.setattr(many, "SHARE", share)
        begun: set[int] = set()
        for which, event in run_many(jobs(tmp_path / str(share), v_base, pictures), device="cpu"):
            assert not isinstance(event, UsageError)
            if event.step and event.step.index == 1:
                begun.add(which)
            if event.file:
                break
        counts.append(len(begun))
    assert counts == [4, 1]


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("[[run]]\nverb = 'spilt'", "run 1: there is no training verb 'spilt'"),
        ("[[run]]\nverb = 'matrix'", "no training verb"),
        ("[[run]]\nverb = 'split'\nimage = 'IMAGE'\nsubjct = 'cat'\nstyle = 'x'", "Did you mean 'subject'"),
        ("[[run]]\nverb = 'split'\nimage = 'IMAGE'\nsubject = 'cat'", "style: Field required"),
        ("[[run]]\nverb = 'split'\nimage = 'IMAGE'\nsubject = 7\nstyle = 'x'", "subject: Input should be"),
        (
            "[[run]]\nverb = 'split'\nimage = 'IMAGE'\nsubject = 'c'\nstyle = 'x'\nset = {rnak = 1}",
            "Did you mean 'rank'",
        ),
        ("[[run]]\nverb = 'split'\nimage = 'IMAGE'\nsubject = 'c'\nstyle = 'x'\nresume = true", "has no 'resume'"),
        ("bsae = 'icons'\n[[run]]\nverb = 'split'", "no verb has 'bsae'"),
        ("base = 'icons'", "there are no runs in it"),
        ("base = ", "not a TOML file"),
        ("method = 'unziplora'", "no whole run.toml"),
        (
            2 * "[[run]]\nverb = 'split'\nimage = 'IMAGE'\nsubject = 'c'\nstyle = 'x'\n",
            "run 1 and run 2 have one folder",
        ),
    ],
)
def test_bad_batches_are_one_line(table: str, what: str, picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "runs.toml"
    file.write_text(table.replace("IMAGE", str(picture)))
    code, text = cli_in_process(["batch", str(file)])
    assert code == 1 and what in text and len(text.strip().splitlines()) == 1, text
    assert [path.name for path in tmp_path.iterdir()] == ["runs.toml"]


def test_the_example_of_the_docs_is_read(picture: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "batch.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    assert len(tomllib.loads(example)["run"]) >= 3
    for name in ("fox.png", "owl.png", "photo.png", "photo-in-ink.png"):
        Image.open(picture).save(tmp_path / name)
    file = tmp_path / "runs.toml"
    file.write_text(example)
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        found = read(file)
    finally:
        os.chdir(here)
    assert [job.method for job in found][:2] == ["unziplora", "unziplora"]
