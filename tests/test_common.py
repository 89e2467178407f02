"""The helpers that all packages share: texts of errors, hashes of files."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from unbraid.bench import results
from unbraid.cli import batch, grid_file
from unbraid.common.atomic import read_toml, sha256
from unbraid.common.errors import LONGEST, UsageError, first_line, suggestion
from unbraid.core.selectors import open_blocks
from unbraid.files.formats.header import read_header
from unbraid.runs.job_folder import folders


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
    assert first_line(ValueError("x" * 500), limit=10) == "xxxx…xxxxx"


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


FIX = f"Give one of these: {', '.join(f'choice-{i}' for i in range(20))}."


def test_a_long_message_keeps_the_fix_and_the_end_of_the_path() -> None:
    path = "/data" + "/a-folder-with-a-long-name" * 12 + "/fox.png"
    inner = UsageError("cannot be read " * 20, path, FIX)
    failed = f"1 of 2 units failed, such as UnZipLoRA: cat, ink ({inner})"
    for error in (
        inner,
        UsageError("not so " * 200, path, FIX),
        UsageError(failed, "work", "Again."),
        UsageError(failed),
    ):
        assert len(str(error)) <= LONGEST and "\n" not in str(error)
        assert FIX in str(error), error
        assert error.fix == "" or str(error).endswith(error.fix)
    assert "/fox.png: cannot be read" in str(inner) and "/fox.png: not so" in str(UsageError("not so " * 200, path))
    assert first_line(inner) == str(inner)
    assert first_line(OSError("no such weights " * 30 + "in /here")).endswith("in /here")


def other_kinds(folder: Path) -> dict[str, Path]:
    """What is wrong with a path → a path."""
    Image.new("RGB", (40, 30), "red").save(folder / "fox.png")
    Image.new("RGB", (40, 30), "red").save(folder / "fox.webp")
    (folder / "model.toml").write_bytes((2).to_bytes(8, "little") + b"{}")
    return {
        "there is no such file": folder / "none",
        "is a folder, not": folder,
        "is a picture, not": folder / "fox.png",
        " is a picture, not": folder / "fox.webp",
        "is a safetensors file, not": folder / "model.toml",
    }


READERS = {
    "settings": lambda path: read_toml(path, "Give another."),
    "grid": grid_file.read,
    "batch": batch.read,
    "results": results.read,
    "blocks": lambda path: open_blocks(str(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_path_of_another_kind_is_called_what_it_is(reader: str, tmp_path: Path) -> None:
    for what, path in other_kinds(tmp_path).items():
        wanted = "no such table of blocks" if reader == "blocks" and path in (tmp_path, tmp_path / "none") else what
        with pytest.raises(UsageError, match=wanted) as raised:
            READERS[reader](path)
        assert "Errno" not in str(raised.value) and "codec" not in str(raised.value)


def test_a_folder_and_a_lora_of_another_kind_are_called_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>\n<p>Größe: not found</p>\n" * 30)
    with pytest.raises(UsageError, match=r"\(it is a text\)\. Give a \.safetensors file"):
        read_header(tmp_path / "page.safetensors")
    other_kinds(tmp_path)
    with pytest.raises(UsageError, match=r"\(it is a picture\)"):
        read_header(tmp_path / "fox.png")
    for path, what in (
        ("fox.png", "is a picture, not a folder"),
        ("none", "there is no such folder"),
        ("", "no job fol"),
    ):
        with pytest.raises(UsageError, match=what):
            folders(tmp_path / path)


def test_lines_of_another_file_are_not_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    with pytest.raises(UsageError, match=r"is no unit of a benchmark.*Give a results\.jsonl"):
        results.read(tmp_path / "notes.txt")
