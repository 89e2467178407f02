"""Settings: a method's keyword-only arguments are its schema; base, TOML file and command line fill it in layers."""

import difflib
import inspect
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from unbraid.errors import UsageError
from unbraid.methods import METHODS, Entry

Settings = dict[str, Any]


def schema(entry: Entry) -> dict[str, inspect.Parameter]:
    """The settings of a method: name → annotation and default."""
    parameters = inspect.signature(entry.make).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def resolve(method: str, base: str, config: Path | None, given: Mapping[str, Any]) -> Settings:
    """All settings of a run: the method's defaults, the base's own (its unbraid.toml), the config file, `--set`."""
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", "--method", _suggest(method, METHODS))
    known = schema(METHODS[method])
    merged = {**base_defaults(base).get(method, {}), **(_read(config).get(method, {}) if config else {}), **given}
    for key in merged:
        if key not in known:
            raise UsageError(f"{method} has no setting {key!r}", "settings", _suggest(key, known))
    fields: dict[str, Any] = {name: (p.annotation, p.default) for name, p in known.items()}
    model = create_model(method, __config__=ConfigDict(extra="forbid"), **fields)
    try:
        return model(**merged).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        fix = f"See `unbraid explain {method}`."
        raise UsageError(f"{first['msg']}, not {first['input']!r}", f"setting {first['loc'][0]}", fix) from error


def base_defaults(base: str) -> dict[str, Settings]:
    """What a base says of itself: `unbraid.toml` in its folder, one table per method."""
    folder = Path(str(files("unbraid.bases").joinpath("icons"))) if base == "icons" else Path(base)
    return _read(folder / "unbraid.toml") if (folder / "unbraid.toml").is_file() else {}


def parse_set(pairs: list[str]) -> Settings:
    """`key=value` strings; values are TOML (numbers, true, "text"), or plain text."""
    out: Settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} is not key=value", "--set", "For example: --set rank=16.")
        try:
            out[key.strip()] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            out[key.strip()] = value
    return out


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"not a TOML file: {error}", path, "One table per method, such as [unziplora] rank = 16."
        ) from error


def _suggest(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
