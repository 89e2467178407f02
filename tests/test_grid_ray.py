"""Grids on Ray and in shares, broken on the way: every job ends once, with the LoRAs of a plain run (tools/chaos/grids.py)."""

import ast
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from test_grid import job

from tools.chaos.material import tiny_base
from tools.chaos.verdict import verdict
from unbraid.common.errors import UsageError
from unbraid.runs.cluster import Cluster, at_work
from unbraid.runs.grid import run_there
from unbraid.runs.grid_worker import answers
from unbraid.runs.job_folder import FAILED, state, write_job

ROOT = Path(__file__).parent.parent


def broken(work: Path, only: str, *more: str) -> dict[str, int]:
    """A short run of the tool, in a process of its own. Returns what happened in it."""
    base = work / "base" if (work / "base").exists() else tiny_base(work / "base")
    words = ["--work", str(work / "runs"), "--base", str(base), "--only", only, *more]
    done = subprocess.run(
        [sys.executable, "-m", "tools.chaos.grids", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    logs = "\n".join(path.read_text()[-2000:] for path in (work / "runs").glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}\n{logs}"
    found = re.search(r"({.*?}); other LoRAs: \[\]", done.stdout)
    assert found, done.stdout
    return ast.literal_eval(found[1])


@pytest.mark.slow
def test_workers_and_a_driver_are_killed(tmp_path: Path) -> None:
    happened = broken(tmp_path, "ray", "--jobs=4", "--workers=2", "--steps=30", "--every=60", "--drivers=1")
    assert happened["drivers killed"] == 1 and happened["workers killed"] >= 1 and happened["ended twice"] == 0


@pytest.mark.slow
def test_shares_are_killed_and_two_drivers_are_on_one_grid(tmp_path: Path) -> None:
    """The plain run to compare with is made once for both."""
    for only, killed in (("shards", 2), ("two", 0)):
        happened = broken(tmp_path, only, "--jobs=6", "--steps=30")
        assert happened == {"killed": killed, "done": 6, "ended twice": 0}


def test_the_verdict_counts_what_happened() -> None:
    good = {"jobs": 48, "workers killed": 30, "drivers killed": 2, "disks full": 1, "killed": 2}
    line = verdict(good)
    assert line.startswith("verdict: kept. 48 of 48 jobs done exactly once, 48 of 48 LoRAs equal bit for bit; 32 kills")
    assert line.endswith("2 of drivers, disk full 1 times")
    assert "broken. 47 of 48 jobs done exactly once" in verdict({**good, "ended twice": 1})
    assert "broken. 48 of 48 jobs done exactly once, 46 of 48 LoRAs" in verdict({**good, "other": 2})


def test_a_full_disk_is_tried_again(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """Ray tries a task again that raises OSError; other errors are answers."""
    good, bad = job(tmp_path / "good", v_base, picture), job(tmp_path / "bad", v_base, picture)
    for one in (good, bad):
        write_job(one)
    (bad.out / "job.toml").write_text("method = 'unknown'")
    work, folders = partial(answers, at_once=1, device="cpu"), [str(good.out), str(bad.out)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            at_work(work, folders, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = {which: (how, error) for which, how, error in at_work(work, folders, 0.0)}
    assert found[0] == ("done", "") and state(good.out) == "done" and not (good.out / FAILED).exists()
    assert found[1][0] == "failed" and "no whole run.toml" in found[1][1]


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Ray is not installed.*unbraid\[ray\]"):
        next(run_there([tmp_path], Cluster()))
