"""The helpers that all packages share: texts of errors, hashes of files."""

import hashlib
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
