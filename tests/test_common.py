"""The helpers that all packages share: texts of errors, hashes of files."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unbraid.common.atomic import sha256
from unbraid.common.errors import first_line, suggestion


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("eulr", "Did you mean 'euler'?"),
        ("EULER", "Did you mean 'euler'?"),
        ("zzz", "There are: ddim, euler."),
        ("", "There are: ddim, euler."),
    ],
)
def test_a_suggestion_is_the_nearest_name_or_all_names(word: str, fix: str) -> None:
    assert suggestion(word, {"ddim": 1, "euler": 2}) == fix
    assert suggestion(word, (name for name in ("ddim", "euler"))) == fix


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError" and first_line(ValueError(" \n")) == "ValueError"
    assert first_line(ValueError("x" * 500), limit=10) == "x" * 10


def test_a_hash_can_skip_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"headerdata")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"headerdata").hexdigest()
    assert sha256(tmp_path / "a", start=6) == hashlib.sha256(b"data").hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux only")
def test_threads_that_wait_give_their_core_to_others() -> None:
    """GNU's OpenMP reads how long threads may wait in a loop when it is loaded, and prints it."""
    code, environment = "import unbraid, torch; torch.get_num_threads()", {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    environment.pop("GOMP_SPINCOUNT", None)
    for given in ({}, {"GOMP_SPINCOUNT": "7"}):
        found = subprocess.run([sys.executable, "-c", code], env=environment | given, capture_output=True, text=True)
        assert f"GOMP_SPINCOUNT = '{given.get('GOMP_SPINCOUNT', '10000')}'" in found.stderr
