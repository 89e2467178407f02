"""`unbraid selftest`: every row passes if all works; a failing row is named, and does not stop the others."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import Tiny

from unbraid.bases.presets import PRESETS
from unbraid.cli import main as cli
from unbraid.common.errors import UsageError
from unbraid.files.lora_file import write
from unbraid.methods import METHODS
from unbraid.runs import outputs, pace
from unbraid.runs.selftest import scene as selftest_scene
from unbraid.runs.selftest.rows import choose, pick, selftest
from unbraid.runs.selftest.scene import Scene


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unbraid", "selftest", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(str(done.value.code))


@pytest.mark.slow
def test_every_row_passes(
    v_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = command(monkeypatch, "--base", str(v_base), "--json")
    out, err = capsys.readouterr()
    found: dict[str, Any] = json.loads(out)
    assert [(row["name"], row["note"]) for row in found["rows"] if not row["passed"]] == [] and code == 0
    names = [row["name"] for row in found["rows"]]
    assert all(f"of {len(names)}: {name}: pass" in err for name in names), "progress is on stderr"
    assert found["passed"] == found["total"] == len(names)
    assert found["about"]["torch"] == torch.__version__ and found["about"]["base"] == str(v_base)
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert names == [check.name for check in choose("cpu")] and METHODS.keys() <= set(names)
    assert [f"vram {name}" for name in PRESETS] == names[-5:]
    by_name = {row["name"]: row for row in found["rows"]}
    assert by_name["resume"]["note"] == "bit for bit" and pace.SAVE_EVERY == 20.0
    assert by_name["vram 8"]["estimate"] < by_name["vram max"]["estimate"] and by_name["vram 8"]["peak"] is None


@pytest.mark.slow
def test_a_single_file(tiny_sdxl: Tiny) -> None:
    rows = selftest(str(tiny_sdxl.file), device="cpu", only=["dreambooth", "classifier-free"])
    assert [(row.name, row.note) for row in rows if not row.passed] == [] and len(rows) == 2


@pytest.mark.slow
def test_sd15_and_a_folder_that_stays(tiny_sd15: Tiny, tmp_path: Path) -> None:
    names = ["unziplora", "make at once", "k-lora"]
    rows = selftest(str(tiny_sd15.folder), device="cpu", only=names, keep=tmp_path / "kept")
    assert [(row.name, row.passed, row.note) for row in rows] == [
        (name, True, "") for name in ("unziplora", "make at once", "k-lora")
    ]
    assert (tmp_path / "kept" / "unziplora" / "content.safetensors").exists()
    with pytest.raises(UsageError, match="not an empty folder"):
        selftest(str(tiny_sd15.folder), device="cpu", keep=tmp_path / "kept")


@pytest.mark.slow
def test_what_fails_is_named(
    v_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training ends normally, but writing the LoRAs fails."""

    def dies(*given: Any, **more: Any) -> None:
        raise TypeError("can't convert a tensor\nof that device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outputs, "write", dies)
    rows = ("--only", "unziplora", "--only", "k-lora", "--only", "edit", "--only", "image to image")
    assert command(monkeypatch, "--base", str(v_base), *rows) == 1
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert "unziplora: TypeError: can't convert a tensor" in lines
    assert "k-lora: selftest: the LoRAs of unziplora could not be made. See the row unziplora." in lines
    assert "edit: TypeError: can't convert a tensor" in lines, "one row does not stop the others"
    assert "The full tracebacks: selftest.log" in lines and lines[-1].startswith("0 of 4 pass")
    log = (tmp_path / "selftest.log").read_text()
    assert "in dies" in log and "of that device" in log and f"torch: {torch.__version__}" in log


@pytest.mark.slow
def test_a_lora_that_is_not_used_whole_fails(v_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers gives no error if a file has layers that the base does not have."""
    scene = Scene(str(v_base), "cpu", tmp_path)
    (file,) = scene.loras("dreambooth")
    modules = selftest_scene.read(file).modules
    name = min(modules)
    extra = {**modules, name.replace("transformer_blocks.0", "transformer_blocks.1"): modules[name]}
    other = tmp_path / "other.safetensors"
    write(other, extra, family="sdxl", metadata={})
    selftest_scene.draws(scene, file)
    with pytest.raises(UsageError, match=f"diffusers uses {len(modules)} of its {len(modules) + 1} layers"):
        selftest_scene.draws(scene, other)


@pytest.mark.slow
def test_a_lora_that_does_nothing_fails(v_base: Path, tmp_path: Path) -> None:
    scene = Scene(str(v_base), "cpu", tmp_path)
    (file,) = scene.loras("dreambooth")
    modules = {name: scaled(lora, 1e-4) for name, lora in selftest_scene.read(file).modules.items()}
    write(file, modules, family="sdxl", metadata={})
    with pytest.raises(UsageError, match="changes nothing in the picture"):
        selftest_scene.draws(scene, file)


def scaled(lora: Any, factor: float) -> Any:
    return type(lora)(lora.down, lora.up * factor, lora.alpha)


def test_wrong_words() -> None:
    with pytest.raises(UsageError, match="Did you mean 'k-lora'"):
        choose("cpu", ["klora"])
    with pytest.raises(UsageError, match="no such device"):
        pick("abacus")
    with pytest.raises(UsageError, match="no such base model"):
        selftest("nowhere/at/all", device="cpu")


@pytest.mark.slow
def test_on_the_embedded_base() -> None:
    names = ["unziplora", "style guidance", "resume", "batch"]
    rows = selftest(device="cpu", only=names)
    assert [(row.name, row.note) for row in rows if not row.passed] == [] and len(rows) == 4
