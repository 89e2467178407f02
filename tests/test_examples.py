"""The examples run as they stand, on the embedded base, but for the number of training steps."""

import re
import sys
from pathlib import Path

import pytest

from unbraid.files.lora_file import read

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHORT = {"learn": "steps=6", "split": "steps=6, window=1", "pair": "steps=6, style_from=3"}  # by the verb of a training


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = re.compile(r"unbraid\.(\w+)\((.*?)\bsteps=\d+")
    text, trainings = call.subn(lambda found: f"unbraid.{found[1]}({found[2]}{SHORT[found[1]]}", script.read_text())
    monkeypatch.setattr(sys, "argv", [script.name, str(tmp_path / "out")])
    exec(compile(text, script, "exec"), {"__name__": "__main__"})
    printed = [Path(line.partition(": ")[0]) for line in capsys.readouterr().out.splitlines()]
    loras = [path for path in printed if path.suffix == ".safetensors"]
    assert trainings and loras and all(any(one.up.any() for one in read(path).modules.values()) for path in loras)
    assert all(path.is_file() for path in printed if path.suffix)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_is_listed(script: Path) -> None:
    assert (ROOT / "examples" / "README.md").read_text().count(script.name) == 2
