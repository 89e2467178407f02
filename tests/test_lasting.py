"""Training results are never lost if something else fails; a folder has one run at a time; damaged states are refused."""

import base64
import json
import os
import subprocess
import sys
import threading
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_run import cli_in_process

import unbraid
from unbraid.cli.batch import read as read_batch
from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError
from unbraid.runs import folder
from unbraid.runs.api import learn_job
from unbraid.runs.batch import recorded, run_many
from unbraid.runs.job import Job, finished
from unbraid.runs.run import run


@pytest.fixture
def job(v_base: Path, picture: Path, tmp_path: Path) -> Job:
    options: dict[str, Any] = {"base": str(v_base), "rank": 2, "steps": 4, "previews": 2, "lr": 1e-3}
    return learn_job(picture, prompt="a sks cat", out=tmp_path / "r", **options)


def arguments(job: Job, *more: str) -> list[str]:
    (file,) = job.data.images["image"]
    known = ["learn", str(file), "--prompt", "a sks cat", "--base", job.base, "--out", str(job.out), "--quiet"]
    return [*known, *(f"--set={key}={job.settings[key]}" for key in ("rank", "steps", "lr")), *more]


FAULTS = [OSError(28, "No space left on device"), ValueError("multiline"), UsageError("no font"), torch.OutOfMemoryError("CUDA"), RuntimeError("cuDNN")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda one: type(one).__name__)
def test_nothing_trained_is_lost_to_a_drawing(fault: Exception, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever error drawing raises, the LoRAs are written, previews and sheet are missing, and each failure is reported."""
    from unbraid.images import sheets

    def fail(*_: object) -> Image.Image:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(sheets, "contact_sheet", fail)
        events = list(run(job, device="cpu"))
    warnings = [event.warning for event in events if event.undone]
    assert [one.partition(" could")[0] for one in warnings] == [
        "the preview of step 2",
        "the preview of step 4",
        "sheet.png",
    ]
    names = [event.file.name for event in events if event.file]
    assert names == ["lora.safetensors", "loss.png"] and finished(job)


@pytest.mark.slow
def test_exit_status_3(job: Job, v_base: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sheet.png is a folder, so writing it really fails."""
    (job.out / "sheet.png").mkdir(parents=True)
    code, text = cli_in_process(arguments(job, "--previews=1"))
    assert code == 3 and text.count("could not be made") == 1 and "sheet.png" in text and finished(job)
    table = f"base={str(v_base)!r}\nimages=[{str(picture)!r}]\nprompt='a cat'\nprevious=1\n".replace(
        "previous", "previews"
    )
    for name in "ab":
        table += f"[[run]]\nverb='learn'\nout={str(tmp_path / name)!r}\nset={{rank=2,steps=2}}\n"
    (tmp_path / "runs.toml").write_text(table)
    (tmp_path / "a" / "sheet.png").mkdir(parents=True)
    code, text = cli_in_process(["batch", str(tmp_path / "runs.toml"), "--quiet"])
    assert code == 3 and (tmp_path / "b" / "sheet.png").is_file() and (tmp_path / "a" / "lora.safetensors").exists()
    (tmp_path / "c" / "sheet.png").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match=r"sheet\.png could not be made"):
        unbraid.learn(picture, prompt="a cat", base=str(v_base), rank=2, steps=1, previews=1, out=tmp_path / "c")


def test_in_a_batch_a_fault_is_that_run_s_alone(
    v_base: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes unexpected errors."""
    from unbraid.runs import run as runs

    prepare = runs.prepare

    def sometimes(job: Job, *rest: Any) -> Any:
        if job.out.name == "bad":
            raise ValueError("a riddle\nof two lines")
        return prepare(job, *rest)

    monkeypatch.setattr(runs, "prepare", sometimes)
    options: dict[str, Any] = {"base": str(v_base), "rank": 2, "steps": 2, "previews": 0}
    jobs = [learn_job(picture, prompt="a cat", out=tmp_path / name, **options) for name in ("one", "bad", "two")]
    failed = {which: str(event) for which, event in run_many(jobs, device="cpu") if isinstance(event, UsageError)}
    assert list(failed) == [1] and "ValueError: a riddle of two lines" in failed[1]
    assert finished(jobs[0]) and finished(jobs[2])


def test_the_training_picture_may_go_while_it_trains(job: Job, tmp_path: Path) -> None:
    """The thumbnail is made from the picture that was opened at the start."""
    copy = tmp_path / "copy.png"
    Image.open(job.data.images["image"][0]).save(copy)
    options: dict[str, Any] = {"base": job.base, "rank": 2, "steps": 2, "previews": 0}
    todo = learn_job(copy, prompt="a cat", out=tmp_path / "o", **options)
    events = run(todo, device="cpu")
    next(events)
    copy.unlink()
    list(events)
    assert finished(todo)


def meta(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.slow
def test_no_paths_in_the_metadata_and_less_if_wanted(job: Job, tmp_path: Path) -> None:
    home = Path(job.base).parent
    for name, more in (("all", []), ("plain", ["--no-thumbnail"]), ("bare", ["--no-metadata"])):
        code, text = cli_in_process([*arguments(job, "--previews=0", *more)[:-1], *more, f"--out={tmp_path / name}"])
        assert code == 0, text
    every, plain, bare = (meta(tmp_path / name / "lora.safetensors") for name in ("all", "plain", "bare"))
    assert not any(str(home) in value or str(tmp_path) in value for value in every.values())
    assert every["ss_sd_model_name"] == every["unbraid.base"] == Path(job.base).name
    assert every["modelspec.thumbnail"].startswith("data:image/") and "modelspec.thumbnail" not in plain
    assert plain.keys() == every.keys() - {"modelspec.thumbnail"}
    assert not any("sks" in value for value in bare.values()) and not any(key.startswith("unbraid.") for key in bare)
    assert bare["ss_network_module"] and bare["ss_base_model_version"], "what loaders need stays"
    weights = [load_file(tmp_path / name / "lora.safetensors") for name in ("all", "bare")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert recorded(tmp_path / "bare" / "run.toml").extras.metadata is False
    with pytest.raises(UsageError, match="a module needs its metadata"):
        unbraid.break_job(job.data.images["image"][0], kind="content", prompt="a cat", metadata=False)
    assert base64.b64decode(every["modelspec.thumbnail"].partition(",")[2])[:2] == b"\xff\xd8"


def test_a_finished_run_is_not_trained_again(job: Job) -> None:
    list(run(job, device="cpu"))
    before = {path: path.stat().st_mtime_ns for path in job.out.rglob("*")}
    events = list(run(job, resume=True, device="cpu"))
    assert ["done already" in event.warning for event in events] == [True]
    code, text = cli_in_process([*arguments(job, "--previews=2", "--resume")])
    assert code == 0 and "done already" in text
    assert {path: path.stat().st_mtime_ns for path in job.out.rglob("*")} == before
    other = learn_job(
        job.data.images["image"][0], prompt="a sks cat", out=job.out, base=job.base, rank=3, steps=4, previews=2
    )
    with pytest.raises(UsageError, match=r"other settings: rank: 2 there, 3 here"):
        list(run(other, resume=True, device="cpu"))


@pytest.mark.slow
def test_one_run_at_a_time_in_a_folder(job: Job) -> None:
    job = replace(job, extras=replace(job.extras, previews=0))
    events = run(job, device="cpu")
    next(events)
    with pytest.raises(UsageError, match="another run is at work"):
        list(run(job, resume=True, device="cpu"))
    script = "import sys; from unbraid.cli.main import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    command = [sys.executable, "-c", script, *arguments(job, "--previews=0", "--resume")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1 and "another run is at work" in done.stderr and len(done.stderr.splitlines()) == 1
    list(events)
    assert finished(job) and not (job.out / ".lock").exists()


@pytest.mark.slow
def test_a_lock_left_by_a_killed_run_is_no_lock(job: Job) -> None:
    job = replace(job, extras=replace(job.extras, previews=0))
    events = run(job, device="cpu")
    next(events)
    events.close()  # type: ignore[attr-defined]
    (job.out / ".lock").touch()
    (job.out / ".3e8-0.part.png").touch()
    list(run(job, resume=True, device="cpu"))
    assert finished(job) and not list(job.out.glob(".*"))


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    """The last writer wins, the file is complete, and temporary names do not collide."""
    errors: list[BaseException] = []

    def write(i: int) -> None:
        try:
            for _ in range(50):
                with atomic(tmp_path / "x.txt") as part:
                    part.write_text(str(i) * 5000)
        except (UsageError, OSError) as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(set((tmp_path / "x.txt").read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def stopped(job: Job) -> Path:
    """A run that was stopped before it was finished, with its saved state."""
    events = run(job, device="cpu")
    for event in events:
        if event.file and event.file.suffix == ".safetensors":
            break
    events.close()  # type: ignore[attr-defined]
    return job.out / folder.STATE


@pytest.mark.slow
@pytest.mark.parametrize("place", range(6))
def test_one_flipped_bit_of_a_saved_state_is_noticed(place: int, job: Job) -> None:
    job = replace(job, extras=replace(job.extras, previews=0))
    file = stopped(job)
    data = bytearray(file.read_bytes())
    at = 8 + place * (len(data) - 9) // 5
    data[at] ^= 1 << place
    file.write_bytes(data)
    before = (job.out / "lora.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"state\.safetensors: (is damaged|was not saved)"):
        list(run(job, resume=True, device="cpu"))
    assert (job.out / "lora.safetensors").read_bytes() == before


@pytest.mark.slow
def test_saved_states_of_other_contents_are_one_line(job: Job) -> None:
    """The checksum is right, as in a file made by an attacker."""
    job = replace(job, extras=replace(job.extras, previews=0))
    file = stopped(job)
    whole = folder.load_state(job.out)
    assert whole
    moment = next(key for key in whole if key.startswith("optimizer/") and whole[key].ndim > 1)
    changes: dict[str, dict[str, torch.Tensor | None]] = {
        "step of 10^6": {"step": torch.tensor(10**6)}, "step -5": {"step": torch.tensor(-5)}, "no step": {"step": None},
        "two steps": {"step": torch.tensor([1, 2])}, "step of a text": {"step": torch.tensor(float("nan"))},
        "no rng": {"rng": None}, "short rng": {"rng": torch.zeros(3, dtype=torch.uint8)}, "rng of floats": {"rng": torch.zeros(5056)},
        "no least": {"least": None}, "no waited": {"waited": None}, "no moment": {moment: None},
        "shape of a moment": {moment: torch.zeros(3)}, "odd key": {"optimizer/x/y/z": torch.zeros(1)}, "odd number": {"optimizer/x/exp_avg": torch.zeros(1)},
        "another's best": {"best/x": torch.zeros(1)},
    }  # fmt: skip
    for name, change in changes.items():
        tensors = {key: value for key, value in {**whole, **change}.items() if value is not None}
        folder.save_state(job.out, tensors)
        with pytest.raises(UsageError) as raised:
            list(run(job, resume=True, device="cpu"))
            pytest.fail(name)
        assert str(raised.value).isprintable(), name
    save_file(whole, file)
    with pytest.raises(UsageError, match="no checksum"):
        list(run(job, resume=True, device="cpu"))
    folder.save_state(job.out, whole)
    list(run(job, resume=True, device="cpu"))
    assert finished(job)


@pytest.mark.slow
def test_damaged_lines_of_events_are_passed_over(job: Job) -> None:
    job = replace(job, extras=replace(job.extras, previews=0))
    stopped(job)
    events = job.out / folder.EVENTS
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(
        lines[0]
        + b"{\n[1]\n\xff\xfe\n{}\n"
        + b'{"step": "x", "loss": 1.0}\n'
        + b"".join(lines[1:])
        + b'{"step": 4, "lo'
    )
    list(run(job, resume=True, device="cpu"))
    assert finished(job) and [json.loads(line)["step"] for line in events.read_text().splitlines()] == [0, 1, 2, 3]


def test_events_are_whole_lines_on_a_full_disk(tmp_path: Path) -> None:
    import resource
    import signal

    events = folder.Events(tmp_path, 0)
    events.add(step=0, loss=0.5)
    events.flush()
    for step in range(1, 500):
        events.add(step=step, loss=0.5, losses=[0.5] * 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(UsageError, match="Make room"):
            events.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert len((tmp_path / folder.EVENTS).read_text().splitlines()) == 1
    events.flush()
    assert [event["step"] for event in folder.read_events(tmp_path)] == list(range(500))


def config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "c.toml"
    file.write_text(text)
    return file


def test_flat_configs_are_the_verb_s_method(picture: Path, tmp_path: Path) -> None:
    def rank(text: str) -> int:
        return learn_job(picture, prompt="a cat", config=config(tmp_path, text)).settings["rank"]

    assert rank("rank = 8") == rank("[dreambooth]\nrank = 8\n[unziplora]\nrank = 4") == 8
    assert rank("rank = 4\n[dreambooth]\nrank = 8") == 8


HOSTILE = {
    "rnak = 8": "Did you mean 'rank'", "[dreamboth]\nrank = 8": "Did you mean 'dreambooth'", "dreambooth = 8": "is a method",
    "[unziplora]\nrank = 8": "none of dreambooth", "rank = [": "not a TOML file", "rank = 'x'": "not 'x'",
    f"rank = {'9' * 5000}": "not a TOML file", f"rank = {'[' * 5000}": "not a TOML file", "rank = 2026-11-27": "setting rank",
    "rank = 0": "out of range", "rank = -4": "out of range", "rank = true": "setting rank", "rank = 8.5": "setting rank",
    "steps = 0": "out of range", "steps = -1": "out of range", "steps = 99999999999999999999": "out of range", "lr = nan": "no number",
    "lr = inf": "no number", "lr = -1.0": "negative", "weight_decay = -inf": "no number", "lr = '1e-3x'": "setting lr",
    "[dreambooth.rank]\nx = 1": "setting rank",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:30])
def test_hostile_settings_are_one_line(text: str, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=HOSTILE[text]) as raised:
        learn_job(picture, prompt="a cat", config=config(tmp_path, text))
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("option", "what"),
    [("--seed=-1", "is no seed"), (f"--seed={2**64}", "is no seed"), ("--previews=-1", "is no previews"), ("--previews=99999", "is no previews"),
     ("--set=steps=99999999999999999999", "out of range"), ("--set=lr=nan", "no number"), ("--set=rank=" + "9" * 5000, "setting rank"),
     ("--set=rank=" + "[" * 5000, "setting rank"), ("--out=" + "n" * 300, "cannot be used"), ("--prompt=a\udc80b", "no Unicode text")],
)  # fmt: skip
def test_hostile_options_are_one_line(option: str, what: str, job: Job) -> None:
    code, text = cli_in_process([*arguments(job), option])
    assert code == 1 and what in text and len(text.splitlines()) == 1 and len(text) < 800, text


@pytest.mark.parametrize(
    "text",
    [
        "run = [1]",
        "run = 1",
        "[[run]]\nverb = 1",
        "[[run]]\nverb = 'learn'\nimages = 1979-05-27\nprompt = 'x'",
        "run = []",
    ],
)
def test_hostile_batches_are_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        read_batch(config(tmp_path, text))
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("change", [{"seed": "x"}, {"seed": -1}, {"previews": 10**9}, {"images": [1]}, {"captions": [1]}, {"words": {"prompt": 1}}, {"loras": {"a": 1}}, {"base": 3}])  # fmt: skip
def test_hostile_records_are_one_line(change: dict[str, Any], job: Job, tmp_path: Path) -> None:
    next(run(job, device="cpu"))
    record = tomllib.loads((job.out / "run.toml").read_text())
    (tmp_path / "run.toml").write_text(folder.to_toml({**record, **change}))
    with pytest.raises(UsageError) as raised:
        recorded(tmp_path / "run.toml")
    assert str(raised.value).isprintable()
