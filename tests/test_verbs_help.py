"""The help of the training verbs lists their methods and settings, and each shared option is declared once."""

import inspect

import pytest
from test_run import cli_in_process
from typer.testing import CliRunner

from tools.options import of
from unbraid.cli.main import app
from unbraid.cli.options import SHARED
from unbraid.cli.train import app as training
from unbraid.methods import ENTRIES
from unbraid.runs.settings import base_defaults, open_settings


@pytest.mark.parametrize("verb", sorted({entry.verb for entry in ENTRIES}))
def test_help_lists_the_methods_and_their_settings(verb: str) -> None:
    text = " ".join(CliRunner().invoke(app, [verb, "--help"]).output.split())
    for entry in of(verb):
        assert f"--method {entry.name}: {entry.title} ({entry.paper})" in text
        for name, parameter in open_settings(entry).items():
            assert f"{name}={parameter.default}" in text, name
        for name, value in base_defaults("icons").get(entry.name, {}).items():
            assert name not in open_settings(entry) or f"On icons {value}." in text, name
    assert "A base can have its own" in text and "unbraid explain METHOD --base BASE" in text
    for name in SHARED:
        assert f"--{name.strip('_').replace('_', '-')}" in text, name


def test_the_first_method_is_the_default() -> None:
    for command in training.registered_commands:
        if command.callback and (method := inspect.signature(command.callback).parameters.get("method")):
            assert method.default == of(str(command.name))[0].name


def test_an_option_of_the_verb_is_no_setting() -> None:
    code, text = cli_in_process(["make", "a", "b", "--out", "c", "--fine-tune", "2", "--set", "out=d"])
    assert code == 1 and "has an option of its own" in text
