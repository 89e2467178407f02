"""The words that a small base knows: `words.json` in its folder, with `subjects` and `styles`.

A base that was trained on a few hundred words draws something arbitrary for any other word. Large bases have no such file."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from unbraid.bases.pipeline import location

FILE = "words.json"
PLAIN = frozenset("a an the of in on with and style drawing picture icon photo".split())
MOST = 4  # suggestions for a word


@dataclass(frozen=True)
class Words:
    """The subjects, such as `hot dog`, and the styles, such as `line art`, that a base was trained to draw."""

    subjects: tuple[str, ...]
    styles: tuple[str, ...]

    def unknown(self, prompt: str, also: Iterable[str] = ()) -> dict[str, list[str]]:
        """Each word of a prompt that the base does not know → known names that are spelt like it, the nearest first.

        `also`: other prompts whose words are known, such as those that a LoRA was trained with."""
        names: dict[str, list[str]] = {}
        for name in (*self.subjects, *self.styles):
            for word in _words(name):
                names.setdefault(word, []).append(name)
        known = PLAIN | names.keys() | {word for text in also for word in _words(text)}
        return {
            word: [name for near in get_close_matches(word, names, MOST) for name in names[near]][:MOST]
            for word in dict.fromkeys(_words(prompt))
            if word not in known
        }


def words_of(base: str) -> Words | None:
    """The words of a base, given as for `--base`; None where its folder does not list them. A hub id is not downloaded for this."""
    file = Path(location(base)) / FILE
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    return Words(tuple(content["subjects"]), tuple(content["styles"]))


def remarks(base: str, prompts: Iterable[str], also: Iterable[str] = ()) -> list[str]:
    """A remark for each word in the prompts that the base does not know. `also`: see `Words.unknown`."""
    words = words_of(base)
    if not words:
        return []
    found = words.unknown(" ".join(prompts), also)
    count = f"{len(words.subjects):,} subjects"
    return [
        f"this small base does not know the word {word}: "
        + (f"it knows {', '.join(near)}" if near else f"its {count} are in {Path(location(base)) / FILE}")
        for word, near in found.items()
    ]


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())
