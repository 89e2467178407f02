"""The rows of a run's sheet that show what a split is for."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unbraid.bases.words import words_of
from unbraid.images.sheets import CAPTION, SPACE, TITLE
from unbraid.runs import demo, pace, showcase
from unbraid.runs.api import learn_job, split_job
from unbraid.runs.run import run


def test_the_rows_of_a_small_base_name_what_it_knows(tmp_path: Path) -> None:
    known = words_of("icons")
    assert known
    content, style = showcase.rows(demo.job(tmp_path))
    assert (
        content.prompts["cartoon"] == "a sks fox in cartoon style"
        and style.prompts["bell"] == "a bell in line art style"
    )
    assert set(content.prompts) <= set(known.styles) and set(style.prompts) <= set(known.subjects)


def test_the_word_that_was_given_is_not_another_one(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbraid.bases.recognised.pipeline_class", lambda base: "")  # else the hub is asked
    job = split_job(picture, subject="castle", style="sepia", out=tmp_path, base="some/hub-id", rare="ohwx")
    content, style = showcase.rows(job)
    assert len(content.prompts) == len(style.prompts) == 4 and "castle" not in style.prompts
    assert content.prompts["pixel art"] == "an ohwx castle in pixel art style"
    assert style.prompts["lighthouse"] == "a lighthouse in sepia style", "the rare word is that of this castle"


def test_methods_without_words_for_both_have_none(picture: Path, tmp_path: Path) -> None:
    assert showcase.rows(learn_job(picture, prompt="a sks cat", out=tmp_path)) == []
    assert showcase.rows(split_job(picture, subject="cat", style="ink", method="blora", out=tmp_path)) == []


@pytest.mark.parametrize("previews", [0, 1])
def test_the_sheet_has_them(
    v_base: Path, picture: Path, tmp_path: Path, previews: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "SHEET_STEPS", 1)
    options: dict[str, Any] = {"base": str(v_base), "steps": 2, "rank": 2, "previews": previews, "out": tmp_path}
    list(run(split_job(picture, subject="cat", style="ink", **options), device="cpu"))
    if not previews:
        assert not (tmp_path / "sheet.png").exists()
        return
    with Image.open(tmp_path / "sheet.png") as sheet:
        cell = (sheet.width - 6) // 4
        row = cell - 6 + TITLE + CAPTION + SPACE
        assert sheet.height == 6 + 7 * row - SPACE, "the input, four uses, two rows of the showcase"
        last = sheet.crop((6, sheet.height - row + SPACE + TITLE, sheet.width, sheet.height - 26))
        assert len(set(last.convert("L").tobytes())) > 16, "pictures, not paper"
