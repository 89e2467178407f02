"""The studio's queue: states are read from run folders, and trainings are processes that outlive the studio."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from test_run import cli_in_process

import unbraid
from unbraid.common.errors import UsageError
from unbraid.files.formats.header import read_header
from unbraid.runs import folder as run_folder
from unbraid.runs import job_folder, lease
from unbraid.runs.grid_worker import run_here
from unbraid.studio import process, queue
from unbraid.studio.checkpoint import checkpoint
from unbraid.studio.safety import Home, open_home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    found = open_home(tmp_path / "studio")
    yield found
    for run in queue.runs(found):
        process.terminate(run.folder)


def waiting(home: Home, base: Path, picture: Path, name: str = "cat", steps: int = 2) -> Path:
    folder = home.new_run(name)
    given = {"base": str(base), "method": "blora", "steps": steps, "rank": 2, "previews": 0}
    queue.add(folder, unbraid.split_job(picture, subject="cat", style="ink", **given))
    return folder


def until(folder: Path, wanted: Callable[[queue.Run], bool], seconds: float = 240.0) -> queue.Run:
    end = time.monotonic() + seconds
    while not wanted(run := queue.look(folder)):
        assert time.monotonic() < end, (run, process.tail(folder))
        time.sleep(0.1)
    return run


def command_of(folder: Path) -> list[str]:
    running = process.found(folder)
    return running.cmdline() if running else []


def states(home: Home) -> dict[str, str]:
    return {run.name: run.state for run in queue.runs(home)}


@pytest.mark.slow
def test_runs_go_one_after_another_and_a_failure_is_a_sentence(home: Home, v_base: Path, picture: Path) -> None:
    lost = shutil.copy(picture, picture.with_name("lost.png"))
    first, second = waiting(home, v_base, picture), waiting(home, v_base, Path(lost), "dog")
    Path(lost).unlink()
    assert states(home) == {"dog": "waiting", "cat": "waiting"}
    assert queue.advance(home, [""]) == ["cat"]
    assert queue.advance(home, [""]) == []
    with pytest.raises(UsageError, match="at work"):
        queue.remove(home, first)
    run = until(first, lambda run: not run.alive)
    assert (run.state, run.done, run.total) == ("done", 2, 2)
    assert read_header(first / "content.safetensors").shapes
    assert queue.advance(home, [""]) == ["dog"]
    run = until(second, lambda run: not run.alive)
    assert run.state == "failed" and "there is no such image" in run.message
    assert job_folder.state(first) == "done" and job_folder.state(second) == "failed"
    assert [*home.lora_files()] and all(name.startswith("runs/cat/") for name in home.lora_files())
    queue.remove(home, second)
    assert states(home) == {"cat": "done"}


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on(home: Home, v_base: Path, picture: Path) -> None:
    folder = waiting(home, v_base, picture, steps=4000)
    queue.advance(home, [""])
    until(folder, lambda run: run.state == "running")
    other = waiting(home, v_base, picture, "dog")
    queue.stop(folder)
    queue.stop(other)
    stopped = until(folder, lambda run: not run.alive)
    assert stopped.state == "stopped" and stopped.done > 0, process.tail(folder)
    for name in ("content", "style"):
        assert read_header(folder / f"{name}.safetensors").shapes, "what it has learnt so far is there"
    assert f"step-{stopped.done}-content" in checkpoint(home, folder)[0].name, "and the state of the same step"
    assert queue.look(other).state == "stopped"
    assert queue.advance(home, [""]) == []
    queue.go_on(folder)
    assert queue.advance(home, ["", "cuda:7"]) == ["cat"]
    until(folder, lambda run: run.done > stopped.done + 1)
    assert command_of(folder)[-2:] == ["grid", str(folder)]
    queue.stop(folder)
    until(folder, lambda run: run.state == "stopped")


@pytest.mark.slow
def test_a_training_outlives_the_studio(home: Home, v_base: Path, picture: Path) -> None:
    folder = waiting(home, v_base, picture)
    code = (
        "import os, signal, sys; from pathlib import Path; from unbraid.studio import queue, safety;"
        "print(queue.advance(safety.open_home(Path(sys.argv[1])), ['']), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    studio = subprocess.run([sys.executable, "-c", code, str(home.folder)], capture_output=True, text=True)
    assert studio.returncode == -9 and studio.stdout.strip() == "['cat']", studio.stderr
    assert queue.look(folder).alive
    assert until(folder, lambda run: not run.alive).state == "done"


def test_another_process_of_the_same_number_is_not_taken_for_it(home: Home, v_base: Path, picture: Path) -> None:
    folder = waiting(home, v_base, picture)
    me = psutil.Process(os.getpid())
    process.write_json(folder / process.RECORD, {"pid": me.pid, "born": me.create_time(), "device": ""})
    assert queue.look(folder).state == "starting"
    process.write_json(folder / process.RECORD, {"pid": me.pid, "born": me.create_time() - 99, "device": ""})
    run = queue.look(folder)
    assert (run.state, run.message) == ("stopped", queue.CUT_OFF)
    queue.go_on(folder)
    assert queue.look(folder).state == "waiting"


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 99999, '{"pid": "x"}', '{"pid": 1e400, "born": 0}', "\ud800"])
def test_damaged_records_are_no_running_process(home: Home, v_base: Path, picture: Path, text: str) -> None:
    folder = waiting(home, v_base, picture)
    for name in (process.RECORD, "run.toml", "job.toml"):
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert queue.look(folder).state == "stopped"
    assert [run.name for run in queue.runs(home)] == ["cat"]


def test_each_card_has_one_run(home: Home, v_base: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(process, "start", lambda words, folder, device: begun.append((folder.name, device)))
    for name in ("a", "b", "c"):
        waiting(home, v_base, picture, name)
        time.sleep(0.01)
    me = psutil.Process(os.getpid())
    here = {"pid": me.pid, "born": me.create_time(), "device": "cuda:1"}
    process.write_json(home.run("b") / process.RECORD, here)
    assert queue.advance(home, ["cuda:0", "cuda:1"]) == ["a"] and begun == [("a", "cuda:0")]
    (home.run("b") / process.RECORD).unlink()  # or the fixture would end this process


def test_other_workers_take_part(home: Home, v_base: Path, picture: Path) -> None:
    """A worker of a grid trains what is in the queue, and the queue shows it, and leaves alone what another machine has."""
    cat, dog = waiting(home, v_base, picture), waiting(home, v_base, picture, "dog")
    dog = dog.rename(home.runs / "dog=1.5-s0")  # as a grid names its folders
    there = lease.take(dog, "another machine")
    assert states(home) == {"cat": "waiting", "dog=1.5-s0": "starting"}
    assert [event.done for event in run_here([cat], device="cpu")][-1]
    assert (run := queue.look(cat)).state == "done" and run.done == run.total == 2
    assert queue.advance(home, []) == [] and not process.record(dog), "it blocks no card here"
    queue.stop(home.run("dog=1.5-s0"))
    assert (dog / run_folder.STOP).exists() and queue.look(dog).state == "stopping"
    there.release()
    assert queue.look(dog).state == "stopped"
    assert cli_in_process(["grid", str(home.runs), "--quiet", "--device", "cpu"])[0] == 1, "it stops as asked"
    assert "stopped as asked, after step 1 of 2" in job_folder.read_failed(dog)
    assert queue.look(dog).state == "stopped", "as the user wished, not a failure"
    queue.go_on(dog)
    assert states(home) == {"cat": "done", "dog=1.5-s0": "waiting"}
    assert cli_in_process(["grid", str(dog), "--quiet", "--device", "cpu"]) == (0, "")
    assert states(home) == {"cat": "done", "dog=1.5-s0": "done"}
