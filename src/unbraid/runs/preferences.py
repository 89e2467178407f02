"""The base that is used where none is given: the one that a LoRA was made for, the user's own, or the embedded one."""

import os
from collections.abc import Iterable
from pathlib import Path

import typer

from unbraid.common.atomic import read_toml
from unbraid.common.errors import UsageError
from unbraid.files.made_for import recorded_base

VARIABLE = "UNBRAID_BASE"  # the environment variable with the user's base
EMBEDDED = "icons"


def user_file() -> Path:
    """The user's settings: `config.toml` in the folder that the system has for them, such as ~/.config/unbraid."""
    return Path(typer.get_app_dir("unbraid")) / "config.toml"


def default_base() -> str:
    """The base that the environment variable UNBRAID_BASE names, else `base` in the user's file, else `icons`."""
    if name := os.environ.get(VARIABLE):
        return name
    file, fix = user_file(), 'It may hold one line: base = "icons"'
    if not file.is_file():
        return EMBEDDED
    found = read_toml(file, fix)
    if found.keys() - {"base"} or not isinstance(found.get("base", EMBEDDED), str):
        raise UsageError("something else than a base is set in it", file, fix)
    return found.get("base", EMBEDDED)


def base_for(loras: Iterable[Path]) -> str:
    """The base that all of these LoRA files record, if it can be found; else the default one.

    A LoRA records a hub id or `icons` in full, but of a path only the last part."""
    recorded = {recorded_base(file) for file in loras}
    name = recorded.pop() if len(recorded) == 1 else ""
    found = name == EMBEDDED or name.count("/") == 1 or (name and Path(name).exists())
    return name if found else default_base()
