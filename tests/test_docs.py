"""Files, modules, functions and options that the docs name exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from textwrap import dedent
from typing import Any

import pytest
import typer

from unbraid.cli.main import app
from unbraid.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "examples/README.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "LOG.md"),  # a diary, which keeps old names
]
PATH = re.compile(r"(?<![\w/.])(?:src|tests|tools|docs|examples)/[\w./*-]*\w\*?")
DOTTED = re.compile(r"(?<![\w./\"])(?:unbraid|tools)(?:\.[A-Za-z_]\w*)+(?!\w)(?!/)")
RECORDED = {"unbraid.toml", "unbraid.baked", "unbraid.bench"}  # a file, a key in files, an entry point


def fenced(page: Path, language: str) -> Iterator[str]:
    """The fenced code blocks of a page in this language, with continued lines joined."""
    for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        yield block.replace("\\\n", " ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_named_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not [name for name in PATH.findall(text) if not [*ROOT.glob(name)]]
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert not [link for link in links if not (page.parent / link).exists()]
    for name in sorted(set(DOTTED.findall(text)) - RECORDED):
        assert resolve_name(name) is not None


def parse(line: str) -> None:
    """Check a command's verb, options and required arguments, without running it."""
    group: Any = typer.main.get_command(app)
    words = shlex.split(line.removeprefix("$ "), comments=True)
    if words[1:] != ["--version"]:
        group.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    commands = [line for line in "\n".join(fenced(page, "")).splitlines() if re.match(r"(\$ )?unbraid ", line)]
    assert commands or page != ROOT / "README.md"
    for line in commands:
        parse(line)


def test_wrong_commands_are_found() -> None:
    usage_error: Any = typer.BadParameter.__base__  # typer does not export it
    for line in ("unbraid split a.png", "unbraid split a.png --subject a --style b --nothing 1", "unbraid nothing"):
        with pytest.raises((usage_error, KeyError)):
            parse(line)


def test_the_example_of_a_method_works(
    v_base: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, test = (dedent(block) for block in list(fenced(ROOT / "CONTRIBUTING.md", "python"))[:2])
    code: dict[str, Any] = {}
    exec(method, code)
    (entry,) = code["ENTRIES"]
    monkeypatch.setitem(METHODS, entry.name, entry)
    exec(test, code)
    code["test_only_keys_and_values_of_cross_attention_change"](v_base, picture, tmp_path)


def test_wrong_names_are_found() -> None:
    for name in ("unbraid.bench.speed", "unbraid.core.train.nothing", "unbraid.nothing"):
        with pytest.raises((AttributeError, ImportError)):
            resolve_name(name)


def test_the_glossary_is_sorted() -> None:
    lines = (ROOT / "docs" / "glossary.md").read_text("utf-8").splitlines()
    words = [re.sub(r"[\W_]", "", line.split("**")[1]).lower() for line in lines if line.startswith("| **")]
    assert len(words) > 50 and words == sorted(words)
