"""Whole runs on a tiny base: files, resuming after a kill, and all kinds of bad input."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from unbraid.common.errors import UsageError
from unbraid.files.lora_file import read
from unbraid.runs.api import learn_job, split_job
from unbraid.runs.run import run
from unbraid.runs.settings import parse_set, resolve

QUICK = {"rank": 4, "steps": 8, "window": 2, "content_lr": 1e-3, "style_lr": 1e-3}


@pytest.mark.slow
@pytest.mark.usefixtures("arranged")
def test_a_split_makes_what_it_promises(v_base: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = split_job(picture, subject="cat", style="line", out=out, base=str(v_base), previews=2, **QUICK)
    events = list(run(job, device="cpu"))
    assert [e.done for e in events if e.step] == list(range(1, 9))
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        "run.toml", "events.jsonl", "content.safetensors", "style.safetensors", "loss.png", "sheet.png",
        "previews/step_000004.png", "previews/step_000008.png",
    }  # fmt: skip
    record = tomllib.loads((out / "run.toml").read_text())
    assert record["unziplora"]["rank"] == 4 and record["prompts"]["content"] == "a sks cat" and record["seed"] == 0
    assert resolve("unziplora", str(v_base), out / "run.toml", {}) == record["unziplora"]
    assert [json.loads(line)["step"] for line in (out / "events.jsonl").read_text().splitlines()] == list(range(8))
    for stem, prompt in (("content", "a sks cat"), ("style", "a cat in line style")):
        lora = read(out / f"{stem}.safetensors")
        assert len(lora.modules) == 88 and lora.metadata["unbraid.prompt"] == prompt
        assert lora.metadata["modelspec.thumbnail"].startswith("data:image/")
        assert any(bool(one.up.any()) for one in lora.modules.values())
    for name in ("loss.png", "sheet.png"):
        with Image.open(out / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 10


@pytest.mark.slow
def test_seeds_reproduce_and_differ(v_base: Path, picture: Path, tmp_path: Path) -> None:
    tensors = []
    for i, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(i)
        options = {**QUICK, "steps": 4, "sample_times": 1}
        list(
            run(
                split_job(
                    picture, subject="cat", style="line", out=out, base=str(v_base), seed=seed, previews=0, **options
                ),
                device="cpu",
            )
        )
        tensors.append(load_file(out / "content.safetensors"))
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    assert not all(torch.equal(value, tensors[2][key]) for key, value in tensors[0].items())


def test_a_run_is_stopped_by_a_file_and_goes_on(v_base: Path, picture: Path, tmp_path: Path) -> None:
    given = {"method": "blora", "rank": 2, "steps": 4, "previews": 0, "thumbnail": False, "base": str(v_base)}
    jobs = [split_job(picture, subject="cat", style="line", out=tmp_path / name, **given) for name in ("whole", "cut")]  # type: ignore[arg-type]
    list(run(jobs[0], device="cpu"))
    cut = jobs[1].out
    seen = []
    with pytest.raises(UsageError, match="after step 2 of 4"):
        for event in run(jobs[1], device="cpu"):
            seen.append(event)
            if event.step and event.done == 2:
                (cut / "stop").touch()
    assert [event.file.name for event in seen if event.file] == ["content.safetensors", "style.safetensors"]
    assert not (cut / "stop").exists()
    early = load_file(cut / "style.safetensors")
    list(run(jobs[1], device="cpu", resume=True))
    for name in ("content.safetensors", "style.safetensors"):
        whole, found = (load_file(job.out / name) for job in jobs)
        assert all(torch.equal(value, found[key]) for key, value in whole.items())
    assert any(not torch.equal(value, found[key]) for key, value in early.items() if key in found)


@pytest.mark.slow
@pytest.mark.usefixtures("bases_from_disk")
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """SIGKILL at a random step, in a process of its own."""
    arguments = ["split", str(picture), "--subject=cat", "--style=line", f"--base={v_base}", "--previews=0", "--quiet"]
    arguments += [f"--set={key}={value}" for key, value in {**QUICK, "steps": 16}.items()]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli_in_process([*arguments, "--out", str(whole)])[0] == 0
    script = "import unbraid.runs.pace; unbraid.runs.pace.SAVE_EVERY = 0.3; from unbraid.cli.main import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--out", str(cut)], env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while not (cut / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run must still be going when it is killed"
    code, text = cli_in_process([*arguments, "--out", str(cut), "--resume"])
    assert code == 0, text
    for name in ("content.safetensors", "style.safetensors"):
        one, other = load_file(whole / name), load_file(cut / name)
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    steps = [json.loads(line)["step"] for line in (cut / "events.jsonl").read_text().splitlines()]
    assert steps == list(range(16)) and not (cut / "state.safetensors").exists()


def test_learn_takes_several_images(v_base: Path, picture: Path, tmp_path: Path) -> None:
    job = learn_job(
        [picture, picture], prompt="a sks cat", out=tmp_path / "l", base=str(v_base), rank=2, steps=3, previews=0
    )
    list(run(job, device="cpu"))
    with safe_open(tmp_path / "l" / "lora.safetensors", "pt") as file:
        assert file.metadata()["unbraid.method"] == "dreambooth" and len(list(file.keys())) == 3 * 88


@pytest.mark.slow
def test_learn_preserves_the_prior_and_reads_captions(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """The base draws the class pictures if none are given; a picture's caption replaces its prompt."""
    image = Image.open(picture)
    for name in ("a", "b"):
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text("a sks dog in line style\n")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    options = {"out": tmp_path / "l", "base": str(v_base), "rank": 2, "steps": 6, "previews": 0, "seed": 1}
    job = learn_job(files, prompt="a sks cat", class_prompt="a cat", **options)
    steps = [event.step for event in run(job, device="cpu") if event.step]
    assert all(len(step.losses) == 2 and abs(step.loss - sum(step.losses)) < 1e-5 for step in steps)
    assert len(list((tmp_path / "l" / "drawn").glob("prior_*.png"))) == 16
    record = tomllib.loads((tmp_path / "l" / "run.toml").read_text())
    assert (
        record["captions"] == {str(files[1]): "a sks dog in line style"} and record["dreambooth"]["prior_weight"] == 1
    )
    options["out"] = tmp_path / "plain"
    (tmp_path / "b.txt").unlink()
    list(run(learn_job(files, prompt="a sks cat", class_prompt="a cat", **options), device="cpu"))
    with_caption, without = (load_file(tmp_path / name / "lora.safetensors") for name in ("l", "plain"))
    assert not all(torch.equal(value, without[key]) for key, value in with_caption.items()), "the caption is read"
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(UsageError, match="caption is empty"):
        learn_job(files, prompt="a sks cat", base=str(v_base))
    with pytest.raises(UsageError, match="--class-prompt"):
        learn_job(files[:1], prompt="a sks cat", base=str(v_base), prior_weight=1.0)


def test_learn_on_all_linear_layers(v_base: Path, picture: Path, tmp_path: Path) -> None:
    options = {"out": tmp_path / "l", "base": str(v_base), "rank": 2, "steps": 2, "previews": 0}
    list(run(learn_job(picture, prompt="a sks cat", targets="transformers", **options), device="cpu"))
    names = read(tmp_path / "l" / "lora.safetensors").modules
    assert len(names) > 88 and any(name.endswith("ff.net.0.proj") for name in names)
    assert any(name.endswith("attentions.0.proj_in") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eps_base", "sd15_base"])
def test_other_kinds_of_base(kind: str, request: pytest.FixtureRequest, picture: Path, tmp_path: Path) -> None:
    base = str(request.getfixturevalue(kind))
    options = {**QUICK, "steps": 4, "sample_times": 1}
    list(
        run(
            split_job(picture, subject="cat", style="line", out=tmp_path / "r", base=base, previews=1, **options),
            device="cpu",
        )
    )
    assert read(tmp_path / "r" / "style.safetensors").family == ("sdxl" if kind == "eps_base" else "sd15")


def test_bad_input_is_one_line_and_leaves_nothing(v_base: Path, picture: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (20000, 20)).save(tmp_path / "long.png")
    (tmp_path / "file").write_text("in the way")
    good = ["--subject", "cat", "--style", "line", "--base", str(v_base)]
    cases = [
        (["split", str(tmp_path / "none.png"), *good], "no such image"),
        (["split", str(text), *good], "not an image"),
        (["split", str(tmp_path / "dot.png"), *good], "only 1×1"),
        (["split", str(tmp_path / "long.png"), *good], "20000×20"),
        (["split", str(picture), "--subject", " ", "--style", "line", "--base", str(v_base)], "--subject: is empty"),
        (["split", str(picture), *good[:4], "--base", "nowhere"], "no such base"),
        (["split", str(picture), *good, "--set", "rank=65"], "rank 65 does not fit"),
        (["split", str(picture), *good, "--set", "rnak=8"], "Did you mean 'rank'"),
        (["split", str(picture), *good, "--set", "rank=many"], "setting rank"),
        (["split", str(picture), *good, "--set", "words=1"], "'words' is not a setting of the method"),
        (["split", str(picture), *good, "--method", "unzip"], "Did you mean 'unziplora'"),
        (["split", str(picture), *good, "--resume"], "no run to resume"),
        (["split", str(picture), *good, "--out", str(tmp_path / "file")], "is a file"),
    ]
    before = set(tmp_path.rglob("*"))
    for arguments, what in cases:
        if "--out" not in arguments:
            arguments = [*arguments, "--out", str(tmp_path / "out")]
        done = cli_in_process(arguments)
        assert done[0] == 1 and what in done[1], (arguments, done)
        assert len(done[1].strip().splitlines()) == 1 and done[1].startswith("unbraid: ")
    assert set(tmp_path.rglob("*")) == before


def cli_in_process(arguments: list[str]) -> tuple[int, str]:
    """Run the command line in this process, because starting Python takes seconds. Returns exit status and errors."""
    code, _, errors = called_in_process(arguments)
    return code, errors


def called_in_process(arguments: list[str]) -> tuple[int, str, str]:
    """The same, with the standard output between the two."""
    import contextlib
    import io

    from unbraid.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["unbraid", *arguments]
    try:
        with (
            contextlib.redirect_stderr(err),
            contextlib.redirect_stdout(out),
            pytest.raises(SystemExit) as stop,
        ):
            main()
    finally:
        sys.argv = argv
    code = stop.value.code
    return (code if isinstance(code, int) else 1), out.getvalue(), err.getvalue()


def test_an_unwritable_or_full_folder(v_base: Path, picture: Path, tmp_path: Path) -> None:
    options = {**QUICK, "base": str(v_base), "previews": 0}
    for out in (Path("/proc/unbraid"), Path("/dev/full/run")):
        with pytest.raises(UsageError, match=r"cannot be written|is a file"):
            list(run(split_job(picture, subject="cat", style="line", out=out, **options), device="cpu"))


def test_a_full_disk_while_saving(v_base: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the state fails with ENOSPC: one clear error, and no half-written file."""
    import resource

    out = tmp_path / "run"
    job = split_job(picture, subject="cat", style="line", out=out, base=str(v_base), previews=0, **QUICK)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a real limit of the kernel, not a mock
        with pytest.raises(UsageError, match="cannot be written"):
            list(run(job, device="cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    left = {path.name for path in out.iterdir()}
    assert left <= {"run.toml", "events.jsonl"}, left


def test_a_folder_with_another_run_is_refused(v_base: Path, picture: Path, tmp_path: Path) -> None:
    options = {"out": tmp_path / "r", "base": str(v_base), "previews": 0, "rank": 2, "steps": 2}
    list(run(learn_job(picture, prompt="a cat", **options), device="cpu"))
    with pytest.raises(UsageError, match="holds a run already"):
        list(run(learn_job(picture, prompt="a cat", **options), device="cpu"))
    with pytest.raises(UsageError, match="has other settings"):
        list(run(learn_job(picture, prompt="a dog", **options), resume=True, device="cpu"))


def test_a_damaged_state_is_told(v_base: Path, picture: Path, tmp_path: Path) -> None:
    options = {"out": tmp_path / "r", "base": str(v_base), "previews": 0, "rank": 2, "steps": 2}
    job = learn_job(picture, prompt="a cat", **options)
    next(iter(run(job, device="cpu")))
    (tmp_path / "r" / "state.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(UsageError, match="is damaged"):
        list(run(job, resume=True, device="cpu"))


def test_command_line_codes(tmp_path: Path) -> None:
    assert cli_in_process(["split"])[0] == 2
    assert cli_in_process(["nonsense"])[0] == 2
    assert cli_in_process(["explain", "unziplora"])[0] == 0
    assert cli_in_process(["--version"])[0] == 0
    code, text = cli_in_process(
        ["generate", "--prompt", "a cat", "--out", "x.png", "--lora", "a", "--lora-prompt", "b", "--lora-prompt", "c"]
    )
    assert code == 1 and "2 prompts for 1 LoRAs" in text


def test_set_values_are_toml() -> None:
    assert parse_set(["a=1", "b=2e-3", "c=true", "d=plain", 'e="x=y"']) == {
        "a": 1,
        "b": 2e-3,
        "c": True,
        "d": "plain",
        "e": "x=y",
    }
    with pytest.raises(UsageError, match="not key=value"):
        parse_set(["rank"])
