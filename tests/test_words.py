"""Prompts with words that a small base does not know."""

import json
from pathlib import Path

from unbraid.bases.words import Words, remarks, words_of

WORDS = Words(("teapot", "hot dog", "black cat"), ("flat", "line art"))


def test_known_words_are_silent() -> None:
    for prompt in ("a teapot in flat style", "A Hot dog, line art style", "a cat", "", "an icon of the teapot"):
        assert WORDS.unknown(prompt) == {}


def test_an_unknown_word_gets_the_names_that_are_spelt_like_it() -> None:
    assert WORDS.unknown("a teepot in flatt style") == {"teepot": ["teapot"], "flatt": ["flat"]}
    assert WORDS.unknown("a catt") == {"catt": ["black cat"]}
    assert WORDS.unknown("a zeppelin") == {"zeppelin": []}


def test_words_that_a_lora_was_trained_with_are_known() -> None:
    assert WORDS.unknown("a sks fox in ink style", ["a sks fox", "ink style"]) == {}
    assert WORDS.unknown("a sks fox in ink style", ["a sks fox"]) == {"ink": []}


def test_a_base_lists_its_words_in_its_folder(tmp_path: Path) -> None:
    assert words_of(str(tmp_path)) is None
    (tmp_path / "words.json").write_text(json.dumps({"subjects": ["teapot"], "styles": ["flat"]}))
    assert words_of(str(tmp_path)) == Words(("teapot",), ("flat",))
    assert words_of("someone/some-base") is None, "a hub id is not asked for it"


def test_remarks_suggest_names_or_say_where_they_are(tmp_path: Path) -> None:
    assert remarks(str(tmp_path), ["a teepot"]) == [], "a base without a list knows any word"
    (tmp_path / "words.json").write_text(json.dumps({"subjects": ["teapot", "hot dog"], "styles": ["flat"]}))
    assert remarks(str(tmp_path), ["a teapot in flat style", ""]) == []
    near, far = remarks(str(tmp_path), ["a teepot", "zeppelin"])
    assert near.endswith("know the word teepot: it knows teapot")
    assert far.endswith(f"zeppelin: its 2 subjects are in {tmp_path / 'words.json'}")
    assert remarks(str(tmp_path), ["a teepot"], ["a teepot"]) == []
