"""The examples run as they stand, on the embedded base."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unbraid.files.lora_file import read

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    printed = [Path(line.partition(": ")[0]) for line in done.stdout.splitlines()]
    loras = [path for path in printed if path.suffix == ".safetensors"]
    assert loras and all(any(one.up.any() for one in read(path).modules.values()) for path in loras)
    assert all(path.is_file() for path in printed if path.suffix)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_is_listed(script: Path) -> None:
    assert (ROOT / "examples" / "README.md").read_text().count(script.name) == 2
