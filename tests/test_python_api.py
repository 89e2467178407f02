"""The Python package as one would expect it: names, pictures in memory, progress, a base that is loaded once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_run import called_in_process

import unbraid
from unbraid.common.errors import UsageError
from unbraid.files.made_for import made_for, recorded_base
from unbraid.runs import drawing
from unbraid.runs.after import next_steps
from unbraid.runs.api import learn_job, pair_job, split_job
from unbraid.runs.folder import read_events
from unbraid.runs.job import Progress
from unbraid.runs.preferences import base_for, default_base


def test_names_are_listed() -> None:
    assert {"split", "generate", "UsageError", "__version__"} < set(dir(unbraid))
    assert unbraid.__version__ and unbraid.UsageError is UsageError
    assert all(getattr(unbraid, name) for name in dir(unbraid))


@pytest.fixture(scope="module")
def lora(v_base: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file of a short run, whose folder has a picture that was given as a PIL image."""
    out = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch, Image.open(picture) as image:
        patch.chdir(out)
        events: list[Progress] = []
        run = unbraid.learn(
            image.convert("RGB"), prompt="a sks cat", base=str(v_base), rank=2, steps=2, previews=0, out="r", progress=events.append
        )  # fmt: skip
        assert [event.done for event in events if event.step] == [1, 2]
        return out / run / "lora.safetensors"


def test_a_picture_in_memory_is_saved_for_the_run(lora: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lora.parent.parent)
    (file,) = Path("runs/pictures").iterdir()
    with Image.open(file) as saved, Image.open(picture) as image:
        assert np.array_equal(np.asarray(saved), np.asarray(image.convert("RGB")))
        todo = learn_job([saved.convert("RGB"), picture], prompt="a cat")
        assert todo.data.images["image"] == (file, picture), "the same picture has the same file"
        pair = pair_job(image, image.rotate(90), subject="cat", style="ink")
        assert all(one.parent == file.parent for some in pair.data.images.values() for one in some)


def test_events_have_named_losses_and_what_a_step_costs(lora: Path) -> None:
    events = read_events(lora.parent)
    assert [event["step"] for event in events] == [0, 1]
    for event in events:
        assert event["losses"] == {"image under both": pytest.approx(event["loss"])}
        assert event["rate"] > 0 and event["memory"] > 2**20 and event["time"] > 1.7e9


def test_generate_as_one_would_call_it(
    lora: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plain path for one LoRA, `n` pictures, and the base is loaded once."""
    loads: list[str] = []
    load = drawing.load

    def counted(name: str, **options: Any) -> Any:
        loads.append(name)
        return load(name, **options)

    monkeypatch.setattr(drawing, "load", counted)
    drawing.forget_base()
    given: dict[str, Any] = {"steps": 1, "base": str(v_base), "device": "cpu"}
    two = unbraid.generate("a sks cat", str(lora), n=2, **given)
    one = unbraid.generate("a sks cat", unbraid.Use(lora), seeds=(1,), **given)
    assert len(two) == 2 and np.abs(np.asarray(two[1]).astype(int) - np.asarray(one[0])).max() <= 2
    assert loads == [str(v_base)]
    drawing.forget_base()
    for wrong in ({"n": 0}, {"n": -1}, {"steps": 0}):
        with pytest.raises(UsageError, match="Give 1 to"):
            unbraid.generate("a cat", **{**given, **wrong})


def test_the_default_base_is_the_user_s(monkeypatch: pytest.MonkeyPatch, picture: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("unbraid.runs.preferences.user_file", lambda: tmp_path / "config.toml")
    monkeypatch.delenv("UNBRAID_BASE", raising=False)
    assert default_base() == "icons"
    (tmp_path / "config.toml").write_text('base = "someone/sdxl"')
    monkeypatch.setattr("unbraid.bases.recognised.pipeline_class", lambda base: "")  # else the hub is asked
    assert default_base() == "someone/sdxl" == learn_job(picture, prompt="a cat").base
    monkeypatch.setenv("UNBRAID_BASE", "icons")
    assert default_base() == "icons"
    monkeypatch.delenv("UNBRAID_BASE")
    for wrong in ("base = 3", "bsae = 'icons'", "base = "):
        (tmp_path / "config.toml").write_text(wrong)
        with pytest.raises(UsageError, match=r"config\.toml"):
            default_base()


def test_the_base_of_a_lora_is_used_where_it_can_be_found(
    lora: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNBRAID_BASE", raising=False)
    monkeypatch.setattr("unbraid.runs.preferences.user_file", lambda: lora / "none")
    assert recorded_base(lora) == made_for(lora) == v_base.name
    monkeypatch.chdir(v_base)
    assert base_for([lora]) == "icons", "of a local base only the name is recorded"
    monkeypatch.chdir(v_base.parent)
    assert base_for([lora]) == base_for([lora, lora]) == v_base.name
    assert base_for([]) == "icons"


def test_pictures_record_how_they_were_drawn(lora: Path, v_base: Path, tmp_path: Path) -> None:
    command = [
        "generate",
        "--prompt=a sks cat",
        f"--lora={lora}:0.7",
        f"--base={v_base}",
        "--steps=1",
        "--negative=dog",
    ]
    code, printed, errors = called_in_process([*command, "--n=2", "--seed=3", f"--out={tmp_path / 'd'}"])
    assert code == 0, errors
    assert printed.split() == [str(tmp_path / "d" / name) for name in ("0003.png", "0004.png")]
    with Image.open(tmp_path / "d" / "0004.png") as image:
        found = json.loads(image.info["unbraid"])
        lines = image.info["parameters"].splitlines()
    assert found == {
        "prompt": "a sks cat", "negative": "dog", "seed": 4, "steps": 1, "guidance": 4.0, "base": v_base.name,
        "loras": [{"file": "lora.safetensors", "strength": 0.7}],
    }  # fmt: skip
    assert lines[0] == "a sks cat <lora:lora:0.7>" and lines[1] == "Negative prompt: dog" and "Seed: 4" in lines[2]
    code, printed, errors = called_in_process([*command, "--sweep=lora=0:1:2", f"--out={tmp_path / 's'}"])
    names = {path.name for path in (tmp_path / "s").iterdir()}
    assert code == 0 and names == {"lora_0_0000.png", "lora_1_0000.png", "sweep.png"}, (
        "the pictures, and a sheet of them"
    )


def test_a_run_ends_with_what_to_do_next(v_base: Path, picture: Path, tmp_path: Path) -> None:
    command = [
        "learn",
        str(picture),
        "--prompt=a sks cat",
        f"--base={v_base}",
        "--previews=0",
        f"--out={tmp_path / 'r'}",
    ]
    code, _, errors = called_in_process([*command, "--set=rank=2", "--set=steps=1"])
    assert code == 0
    text = " ".join(errors.split())
    assert "lora.safetensors: strength 1 as trained, try 0.6 to 1.2; trigger words: a sks cat" in text
    line = next(line for line in errors.splitlines() if "next: unbraid" in line)
    from test_docs import parse

    parse(line.strip().removeprefix("next: "))


def test_a_split_ends_with_a_drawing_in_its_style_by_role_where_roles_were_measured(
    v_base: Path, picture: Path
) -> None:
    for base, by_role in (("icons", True), (str(v_base), False)):
        job = split_job(picture, subject="cat", style="ink", base=base, out=picture.parent / "run")
        *_, line = next_steps(job)
        assert "--prompt 'a teapot in ink style'" in line and "run/style.safetensors" in line
        assert ("--lora-role style" in line) == by_role


def test_a_notebook_shows_a_run_as_its_sheet(v_base: Path, picture: Path, tmp_path: Path) -> None:
    given = {"prompt": "a sks cat", "base": str(v_base), "rank": 2, "steps": 2}
    run = unbraid.learn(picture, **given, previews=1, out=tmp_path / "run")  # type: ignore[arg-type]
    assert isinstance(run, unbraid.Run) and isinstance(run, Path) and run == tmp_path / "run"
    assert hash(run) == hash(tmp_path / "run") and (run / "lora.safetensors").is_file()
    shown = run._repr_png_()
    assert shown == (run / "sheet.png").read_bytes()
    with Image.open(run / "sheet.png") as sheet:
        assert np.array_equal(np.asarray(run.sheet), np.asarray(sheet.convert("RGB")))
    plain = unbraid.learn(picture, **given, previews=0, out=tmp_path / "plain")  # type: ignore[arg-type]
    assert plain._repr_png_() is None
    with pytest.raises(UsageError, match="no sheet"):
        _ = plain.sheet
