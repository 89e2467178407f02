"""The benchmark on Ray and in shares: the units and figures of a plain run, each done once."""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from test_bench import table, tiny

from unbraid.bench import grid
from unbraid.bench.grid import Done, unit_file
from unbraid.bench.rows import training_cache
from unbraid.bench.rows.row import BASE
from unbraid.cli.main import main
from unbraid.common.errors import UsageError
from unbraid.runs import cluster, folder, job_folder, pace
from unbraid.runs.cluster import Cluster
from unbraid.runs.lease import PREFIX, take

NAMES = (BASE, "direct sum", "TIES")  # the last two share their trainings


def figures(done: list[Done]) -> dict[str, list[object]]:
    """Unit → its drawings with their scores, without what differs from run to run: times, memory."""
    return {
        one.unit.key: [one.unit.row, one.unit.drawings, one.unit.diversity, one.unit.cost.flops, one.unit.cost.file]
        for one in done
        if one.unit
    }


def made(work: Path) -> dict[Path, int]:
    """The files that are written once: units, trainings and what is derived from them."""
    files = [*work.glob("units/*/unit.json"), *work.glob("made/*/cost.json"), *work.glob("made/*.safetensors")]
    return {file: file.stat().st_mtime_ns for file in files}


def start_ray(workers: int) -> None:
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    import ray

    sizes = {"num_cpus": workers, "object_store_memory": 100_000_000}
    ray.init(**sizes, include_dashboard=False, log_to_driver=False)  # type: ignore[arg-type]


def kill_a_worker(work: Path, killed: list[int], until: float) -> None:
    """Kill the first worker that has a unit: its process id is in the lease."""
    while not killed and time.monotonic() < until:
        time.sleep(0.05)
        for path in work.glob(f"units/*/{PREFIX}*"):
            with suppress(OSError, ValueError, psutil.Error):
                worker = psutil.Process(json.loads(path.read_bytes())["process"])
                if not killed and worker.pid != os.getpid():
                    worker.kill()
                    killed.append(worker.pid)


@pytest.mark.slow
@pytest.mark.usefixtures("bases_from_disk")
def test_on_ray_a_killed_worker_is_survived_and_the_figures_are_those_of_a_plain_run(
    tmp_path: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(pace, "LOOK_AGAIN", 1.0)
    plain = list(grid.run(tiny(tmp_path / "plain", v_base, *NAMES, task="combine")))
    todos, killed = tiny(tmp_path / "ray", v_base, *NAMES, task="combine"), list[int]()
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "ray", killed, time.monotonic() + 60))
    start_ray(2)
    try:
        killer.start()
        done = [one for one in grid.run(todos, ray=Cluster()) if not one.held]
    finally:
        ray.shutdown()
        killer.join()
    assert killed and len(done) == len(todos)
    assert figures(done) == figures(plain) and table(done) == table(plain)
    before = made(tmp_path / "ray")
    assert figures(list(grid.run(todos, ray=Cluster()))) == figures(plain), "all is done: Ray is not even started"
    assert made(tmp_path / "ray") == before and not [*(tmp_path / "ray").glob(f"*/*/{PREFIX}*")]
    trained = [file.parent for file in before if file.name == "cost.json"]
    assert trained and all(job_folder.state(one) == "done" for one in trained), "each training is a job folder"


@pytest.mark.slow
@pytest.mark.usefixtures("bases_from_disk")
def test_two_shares_do_every_unit_once(
    tmp_path: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of two shares, then the first, then both again, by the command line."""
    plain = list(grid.run(tiny(tmp_path / "plain", v_base, *NAMES, task="combine")))
    monkeypatch.setattr("unbraid.bench.truth.tasks.QUICK", grid_scale := tiny(tmp_path, v_base)[0].scale)
    rows = [word for name in NAMES for word in ("--only", name)]
    words = ["unbraid", "bench", "--work", str(tmp_path / "two"), "--base", str(v_base), "--task", "combine"]
    done = dict[Path, int]()
    for shard, count in (("1/2", 1), ("0/2", 3), ("0/2", 3), ("1/2", 3)):
        monkeypatch.setattr(sys, "argv", [*words, "--processes", "1", "--quiet", *rows, "--shard", shard])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0, capsys.readouterr().err
        now = made(tmp_path / "two")
        assert done.items() <= now.items(), "nothing is made twice"
        done = now
        assert sum(file.name == "unit.json" for file in done) == count
    todos = [replace(one.todo, work=tmp_path / "two", scale=grid_scale) for one in plain]
    assert figures(list(grid.run(todos))) == figures(plain)


def test_what_another_machine_has_comes_later(tmp_path: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "POLL", 0.01)
    first, *_ = todos = tiny(tmp_path, v_base, BASE, task="combine")
    file = unit_file(first)
    file.parent.mkdir(parents=True)
    lease, events = take(file.parent, "another machine"), grid.run(todos)
    assert next(events).held and next(events).held and not file.exists()
    lease.release()
    assert [one.unit for one in events if not one.held] and file.exists()


def test_a_training_that_another_machine_has_is_waited_for_or_told(
    tmp_path: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_cache, "POLL", 0.01)
    cache = grid._training_cache(tmp_path, tiny(tmp_path, v_base)[0].scale, str(v_base), "")
    (tmp_path / "locks" / "made-x-json").mkdir(parents=True)
    lease, calls = take(tmp_path / "locks" / "made-x-json", "another machine"), list[int]()
    with pytest.raises(folder.AtWorkError):
        cache._once(tmp_path / "made" / "x.json", lambda: calls.append(1), waits=False)
    waiting = threading.Thread(
        target=cache._once, args=(tmp_path / "made" / "x.json", lambda: training_cache.write_json(out, calls.append(1)))
    )
    out = tmp_path / "made" / "x.json"
    waiting.start()
    time.sleep(0.1)
    assert not calls
    lease.release()
    waiting.join(60)
    assert calls == [1] and out.exists()


def test_a_full_disk_is_tried_again_and_other_errors_are_told(
    tmp_path: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (todo,) = tiny(tmp_path, v_base, BASE, task="combine")
    (tmp_path / "units").write_text("in the way")
    with pytest.raises(OSError, match="cannot be written"):
        cluster.at_work(grid.answers, [todo], 0.0)
    assert next(grid.run([todo])).error

    def fails(*given: object) -> object:
        raise UsageError("a loss that is no number")

    monkeypatch.setattr(grid, "_do", fails)
    (tmp_path / "units").unlink()
    assert cluster.at_work(grid.answers, [todo], 0.0) == [(0, "failed", "a loss that is no number")]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--shard", "2/2"], "'2/2' is no share of the jobs"),
        (["--images", "DIR", "--shard", "0/2"], "your own pictures are not shared out"),
        (["--images", "DIR", "--ray", "local"], "your own pictures are not shared out"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["unbraid", "bench", "--work", str(tmp_path / "w"), *words])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().err.strip()
    assert end.value.code == 1 and what in printed and len(printed.splitlines()) == 1
    assert not (tmp_path / "w").exists()
