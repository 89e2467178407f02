"""The typed Python API: it is made from the methods' entries, and type checkers find errors with it."""

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import unbraid
from tools import options
from unbraid.bases.presets import AS_IT_IS
from unbraid.cli.options import SHARED
from unbraid.methods import ENTRIES, METHODS
from unbraid.methods.entry import Entry
from unbraid.runs.job import TrainingOptions
from unbraid.runs.run_options import RunOptions
from unbraid.runs.settings import descriptions, open_settings, schema

GOOD = """
import unbraid
from pathlib import Path
run: Path = unbraid.split("a.png", subject="fox", style="ink", rank=8, column_ratio=0.2, seed=3, out="x")
unbraid.split_job("a.png", subject="fox", style="ink", method="blora", lr=1e-3)
unbraid.learn(["a.png"], prompt="a sks fox", from_=run / "lora.safetensors", targets="transformers")
unbraid.pair("a.png", "b.png", subject="fox", style="ink", beside=["c.safetensors"], method="slider", rank=4)
unbraid.zip(run, run, images={"content": "a.png"}, similarity="dot")
unbraid.zip_job(run, run, method="np-lora", mu=2.0)
module = unbraid.break_module("a.png", kind="style", prompt="a cat in ink style", partner_count=0)
unbraid.make(module, module, fine_tune=5, optimizer="adamw", device="cpu")
unbraid.generate("a fox", [run / "style.safetensors"], combine="switch", steps=10, seeds=range(4), height=64, device="cpu")
"""
BAD = (
    'unbraid.split("a.png", subject="fox", style="ink", rnk=8)',
    'unbraid.split("a.png", subject="fox", style="ink", rank="8")',
    'unbraid.split("a.png", subject="fox", style="ink", method="blora", column_ratio=0.1)',
    'unbraid.split("a.png", subject="fox", style="ink", method="unzip")',
    'unbraid.learn("a.png", prompt="a sks fox", targets="everything")',
    'unbraid.pair_job("a.png", "b.png", subject="fox", style="ink", pairs=2)',
    'unbraid.zip("a", "b", method="np-lora", steps=3)',
    'unbraid.break_module("a.png", kind="both", prompt="x")',
    'unbraid.make_job("a", "b", rank=4)',
    'unbraid.generate("a fox", stepps=10)',
    'unbraid.generate("a fox", seeds=3)',
    'unbraid.generate("a fox", combine="product")',
)


def pyright(file: Path) -> list[dict[str, Any]]:
    """The errors that pyright finds. Skips the test if it cannot run: it needs node, or downloads it."""
    found = Path(sys.executable).with_name("pyright")
    command = str(found) if found.exists() else shutil.which("pyright")
    if not command:
        pytest.skip("no pyright")
    done = subprocess.run(
        [command, "--outputjson", "--pythonpath", sys.executable, str(file)], capture_output=True, text=True
    )
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright cannot run: {(done.stderr or done.stdout)[-200:]}")
    return [one for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]


def test_what_is_committed_is_what_the_tool_writes(tmp_path: Path) -> None:
    for path, text in ((options.OPTIONS, options.options()), (options.STUB, options.stub())):
        made = tmp_path / path.name
        made.write_text(text)
        config = ["--config", str(Path(__file__).parent.parent / "pyproject.toml")]
        subprocess.run([sys.executable, "-m", "ruff", "format", "-q", *config, str(made)], check=True)
        assert made.read_text() == path.read_text(), "run python -m tools.options"


def test_every_option_of_a_run_is_used_and_on_the_command_line() -> None:
    given = {name.removesuffix("_") for name in SHARED} - {"set", "resume", "quiet", "template"} | {"templates"}
    used = {*asdict(AS_IT_IS), *TrainingOptions.__annotations__}
    used |= {"out", "base", "seed", "previews", "rare", "config", "thumbnail", "metadata"}
    assert given == used == set(RunOptions.__annotations__)


@pytest.mark.parametrize("entry", ENTRIES, ids=METHODS)
def test_every_setting_is_described(entry: Entry) -> None:
    """In the method's docstring, and in `help(unbraid.split)`."""
    assert descriptions(entry).keys() == schema(entry).keys() and all(descriptions(entry).values())
    assert set(entry.inputs.set_by_verb) <= schema(entry).keys()
    for name in (options.VERBS[entry.verb], options.JOBS[entry.verb]):
        text = inspect.getdoc(getattr(unbraid, name)) or ""
        assert all(f"    {setting}: " in text for setting in open_settings(entry)), name


def test_the_first_method_of_a_verb_is_its_default() -> None:
    for verb in options.VERBS:
        default = inspect.signature(getattr(unbraid, options.JOBS[verb])).parameters["method"].default
        assert default == options.of(verb)[0].name


def test_a_type_checker_knows_every_setting(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(GOOD)
    assert pyright(good) == []
    bad.write_text("\n".join(["import unbraid", *BAD]) + "\n")
    wrong = {one["range"]["start"]["line"] for one in pyright(bad)}
    assert [line for i, line in enumerate(BAD, 1) if i not in wrong] == []
