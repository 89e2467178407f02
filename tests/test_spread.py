"""Runs in several processes, each with a share of the runs."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_run import cli_in_process

from unbraid.bases.base import load
from unbraid.bases.devices import found_device
from unbraid.bases.presets import Loading
from unbraid.common.errors import UsageError
from unbraid.runs.api import learn_job, split_job
from unbraid.runs.job import Job, Progress
from unbraid.runs.run import run
from unbraid.runs.spread import cards, run_spread

pytestmark = pytest.mark.slow

SLOW = 4000  # steps: many more than can be done during a test


def job(out: Path, base: Path, picture: Path, seed: int, steps: int = 3) -> Job:
    return learn_job(picture, prompt="a sks cat", base=str(base), rank=2, steps=steps, seed=seed, previews=0, out=out)


@pytest.mark.usefixtures("bases_from_disk")
def test_each_process_has_its_share(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """All LoRAs are written and equal those of single runs; errors are reported for the run that failed."""
    jobs = [job(tmp_path / f"{i}", v_base, picture, i) for i in range(3)]
    list(run(job(tmp_path / "alone", v_base, picture, 2), device="cpu"))
    jobs.append(replace(job(tmp_path / "no", v_base, picture, 0), base=str(tmp_path / "no base")))
    events = list(run_spread(jobs, 2, at_once=1, device="cpu"))
    assert [n for n, event in events if isinstance(event, UsageError)] == [3]
    files = [event.file for _, event in events if isinstance(event, Progress) and event.file]
    assert {file for file in files if file.suffix == ".safetensors"} == {
        one.out / "lora.safetensors" for one in jobs[:3]
    }
    first, second = (load_file(tmp_path / name / "lora.safetensors") for name in ("2", "alone"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_process_that_is_killed_is_told(v_base: Path, picture: Path, tmp_path: Path) -> None:
    jobs = [job(tmp_path / "long", v_base, picture, 0, SLOW), job(tmp_path / "short", v_base, picture, 1)]
    messages, killed = [], False
    for which, event in run_spread(jobs, 2, at_once=1, device="cpu"):
        messages.append((which, event))
        if not killed and (tmp_path / "long" / "run.toml").exists():
            children = psutil.Process().children()
            holder = next(one for one in children if (tmp_path / "long" / ".lock") in map(Path, _open(one)))
            os.kill(holder.pid, signal.SIGKILL)
            killed = True
    failed = {which: str(event) for which, event in messages if isinstance(event, UsageError)}
    assert list(failed) == [0] and "its process ended with -9" in failed[0]
    assert (tmp_path / "short" / "lora.safetensors").exists()


def _open(process: psutil.Process) -> list[str]:
    return [one.path for one in process.open_files()]


def test_cards_are_dealt_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cards(3) == ["cuda:0", "cuda:1", "cuda:0"] and cards(2, "cuda:1") == ["cuda:1", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cards(2) == ["", ""]


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "mps:1", "meta:x"])
def test_a_device_that_is_not_there_is_one_line(name: str, v_base: Path) -> None:
    with pytest.raises(UsageError, match=f"--device: there is no device '{name}'. There are: .*cpu"):
        load(str(v_base), loading=Loading(device=name))
    assert found_device("cpu") == torch.device("cpu")


def test_the_command_line_says_where(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """run.toml records the device, and a run can continue on another one; `--processes 2` is an option."""
    where = ["--base", str(v_base), "--set", "rank=2", "--set", "steps=2", "--previews", "0", "--quiet"]
    one = ["learn", str(picture), "--prompt", "a sks cat", *where, "--out", str(tmp_path / "r")]
    assert cli_in_process([*one, "--device", "cuda:99"])[0] == 1
    assert cli_in_process([*one, "--device", "cpu", "--no-graphs"])[0] == 0
    record = (tmp_path / "r" / "run.toml").read_text()
    assert 'device = "cpu"' in record and "graphs = false" in record
    runs = [
        f'[[run]]\nverb = "learn"\nimages = ["{picture}"]\nprompt = "a sks cat"\nbase = "{v_base}"\npreviews = 0\n'
        f'out = "{tmp_path / name}"\n[run.set]\nrank = 2\nsteps = 2\n'
        for name in ("a", "b")
    ]
    (tmp_path / "runs.toml").write_text("".join(runs))
    batch = ["batch", str(tmp_path / "runs.toml"), "--processes"]
    assert cli_in_process([*batch, "2", "--quiet"])[0] == 0
    assert all((tmp_path / name / "lora.safetensors").exists() for name in ("a", "b"))
    code, err = cli_in_process([*batch, "0"])
    assert code == 1 and "--processes" in err


def test_split_takes_a_device(v_base: Path, picture: Path, tmp_path: Path) -> None:
    todo = split_job(picture, subject="cat", style="ink", base=str(v_base), device="cuda:1", graphs=False, out=tmp_path)
    assert (todo.loading.device, todo.loading.graphs) == ("cuda:1", False)
