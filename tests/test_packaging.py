"""The wheel is complete and small, and the Dockerfile copies what the wheel is built from."""

import fnmatch
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import wheel

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_can_be_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "dist"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
    ]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    assert wheel.main(out) == 0 and " MB" in capsys.readouterr().out
    (made,) = out.iterdir()
    with zipfile.ZipFile(made) as file:
        packed = {name for name in file.namelist() if name.endswith(".py")}
    assert packed == {path.relative_to(source / "src").as_posix() for path in (source / "src").rglob("*.py")}


def test_a_bad_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wheel.main(tmp_path) == 1 and "0 wheels" in capsys.readouterr().err
    made = tmp_path / "unbraid-1.0-py3-none-any.whl"
    good = (*wheel.NEEDED, "unbraid/bases/icons/unet/a.safetensors", "unbraid-1.0.dist-info/METADATA")
    for names, words in (
        (good, ""),
        (good[1:], "py.typed is missing"),
        ([name for name in good if not name.endswith(".safetensors")], "the weights of icons are missing"),
        ((*good, "tests/test_a.py"), "tests/test_a.py does not belong there"),
    ):
        with zipfile.ZipFile(made, "w") as file:
            for name in names:
                file.writestr(name, "")
        assert wheel.main(tmp_path) == (1 if words else 0)
        assert words in capsys.readouterr().err
    monkeypatch.setattr(wheel, "LARGEST", 100)
    assert wheel.main(tmp_path) == 1 and "are allowed" in capsys.readouterr().err


def test_the_dockerfile_copies_what_a_build_needs() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = [line.removeprefix("COPY ").split()[:-1] for line in text.splitlines() if line.startswith("COPY ")]
    copied = {name for line in lines for name in line}
    assert copied == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "src"}
    assert all((ROOT / name).exists() for name in copied)
    sent = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert {line[1:] for line in sent if line.startswith("!")} == copied and sent[0] == "*"
    assert not any(fnmatch.fnmatch("src/unbraid/runs/run.py", line) for line in sent[1:] if not line.startswith("!"))
    (extra,) = re.findall(r'"/source\[(\w+)\]"', text)
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text("utf-8")
