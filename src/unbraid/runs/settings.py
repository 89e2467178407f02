"""Settings: a method's keyword-only arguments are the schema; base, TOML file and command line override defaults."""

import inspect
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError, create_model

from unbraid.common.atomic import read_toml
from unbraid.common.errors import UsageError, suggestion
from unbraid.methods import METHODS
from unbraid.methods.entry import Entry

Settings = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])
SEEDS, PREVIEWS, RESOLUTIONS, WARM_UPS = range(2**62), range(1001), range(4097), range(10**6 + 1)
BATCH_SIZES = range(1, 1025)
MOST = 10_000_000  # the upper limit of every setting that is a whole number
LEAST = {"rank": 1, "steps": 1, "window": 1, "every": 1, "patience": 1, "pairs": 1, "sample_times": 1}
SIGNED: frozenset[str] = frozenset()  # settings of type float that may be negative
RECORDED = frozenset(  # keys of a run.toml other than the table of its method
    "unbraid method base vae parts prediction vram swap compile graphs device timesteps seed resolution schedule warm_up batch_size alpha optimizer templates blocks previews thumbnail metadata words images sha256 loras captions prompts".split()
)


def schema(entry: Entry) -> dict[str, inspect.Parameter]:
    """The settings of a method: name → annotation and default."""
    parameters = inspect.signature(entry.make).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def open_settings(entry: Entry) -> dict[str, inspect.Parameter]:
    """The settings of a method that users can give: all except those that its verb sets."""
    return {name: p for name, p in schema(entry).items() if name not in entry.inputs.set_by_verb}


def descriptions(entry: Entry) -> dict[str, str]:
    """Setting → its description, from lines in the method's docstring: `name: text.` or `name, other: text.`"""
    known = "|".join(sorted(schema(entry), key=len, reverse=True))
    text = " ".join((inspect.getdoc(entry.make) or "").split())
    parts = re.split(rf"(?:^|(?<=[.!?)] ))((?:{known})(?:, (?:{known}))*): ", text)
    found: dict[str, str] = {}
    for names, about in zip(parts[1::2], parts[2::2], strict=True):
        found |= dict.fromkeys(names.split(", "), about.strip())
    return found


def about(entry: Entry, name: str) -> str:
    """A setting's description and default, and the default on the embedded base if that one differs."""
    text, default = descriptions(entry)[name], schema(entry)[name].default
    own = base_defaults("icons").get(entry.name, {}).get(name, default)
    usual = f"Default {default!r}" + (f"; on icons {own!r}." if own != default else ".")
    return f"{text[:1].upper()}{text[1:]} {usual}"


def documented(verb: str) -> Callable[[F], F]:
    """Add the settings of all methods of a verb to the docstring of its function."""

    def add(function: F) -> F:
        lines = [
            inspect.getdoc(function) or "",
            "",
            "`options`: those of `runs.run_options.RunOptions`, and the method's settings.",
        ]
        for entry in (one for one in METHODS.values() if one.verb == verb):
            lines += ["", f"method={entry.name!r}: {entry.title} ({entry.paper})"]
            lines += [f"    {name}: {about(entry, name)}" for name in open_settings(entry)]
        function.__doc__ = "\n".join(lines)
        return function

    return add


def resolve(method: str, base: str, config: Path | None, given: Mapping[str, Any]) -> Settings:
    """All settings of a run. UsageError for unknown names and wrong values.

    Later sources override earlier ones: the method's defaults, those of the base's family, the base's unbraid.toml, the
    config file, `given`."""
    from unbraid.bases.recognised import family_preset  # imports diffusers, which the help of the verbs does not need

    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", "--method", suggestion(method, METHODS))
    known = schema(METHODS[method])
    chosen = {**(_configured(config, method) if config else {}), **given}
    merged = {**family_preset(base, method).settings, **base_defaults(base).get(method, {}), **chosen}
    for key in merged:
        if key not in known:
            raise UsageError(f"{method} has no setting {_short(key)}", "settings", _other_setting(key, known, merged))
        if type(merged[key]) is bool and known[key].annotation is not bool:
            raise UsageError(
                f"a number is wanted, not {merged[key]}", f"setting {key}", f"See `unbraid explain {method}`."
            )
    fields: dict[str, Any] = {name: (p.annotation, p.default) for name, p in known.items()}
    model = create_model(method, __config__=ConfigDict(extra="forbid"), **fields)
    try:
        found = model(**merged).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        fix = f"See `unbraid explain {method}`."
        where = f"setting {first['loc'][0]}"
        raise UsageError(f"{first['msg']}, not {_short(first['input'])}", where, fix) from error
    for name, value in found.items():
        _in_range(name, value, known[name].default)
    for name, most in METHODS[method].inputs.limits.items():
        if name not in chosen:
            found[name] = min(found[name], most(found))
    return found


def _other_setting(key: str, known: Iterable[str], merged: Mapping[str, Any]) -> str:
    """What to give instead of an unknown setting. Two methods have no `steps`: one trains nothing, one has `fine_tune`."""
    if key == "steps":
        fine_tune = f"Its steps are --fine-tune {_short(merged[key])}."
        return fine_tune if "fine_tune" in known else "It trains nothing: leave steps out."
    return suggestion(key, known)


def _configured(path: Path, method: str) -> Settings:
    """A method's settings from a TOML file: top-level keys, and the table of the method's name. A run.toml works, too.

    UsageError for a key that is neither a setting of the method nor the table of another method."""
    table, known = _read(path), schema(METHODS[method])
    recorded = table.keys() >= {"unbraid", "method"}
    own: Any = table.get(method, {})
    for name, value in table.items():
        if name in METHODS and not isinstance(value, dict):
            raise UsageError(f"{name} is a method, not a setting", path, f"Write a table, [{name}].")
        if name not in METHODS and name not in known and not (recorded and name in RECORDED):
            fix = suggestion(name, {**known, **METHODS})
            raise UsageError(f"{method} has no setting {_short(name)}, and no method is called so", path, fix)
    flat = {name: value for name, value in table.items() if name in known and name not in METHODS}
    if not flat and not own and table:
        names = ", ".join(name for name in table if name in METHODS)
        raise UsageError(
            f"it has settings of {names or 'nothing'}, and none of {method}", path, f"Add a table [{method}]."
        )
    return {**flat, **own}


def counted(name: str, value: Any, among: range) -> int:
    """Return `value` if it is a whole number in the range `among`. UsageError otherwise."""
    if type(value) is not int or value not in among:
        raise UsageError(f"{_short(value)} is no {name}", f"--{name}", f"Give {among[0]} to {among[-1]}.")
    return value


def _in_range(name: str, value: Any, default: Any) -> None:
    """Check a number. UsageError if an int is out of its limits, or a float is infinite, NaN, or wrongly negative."""
    where = f"setting {name}"
    if type(value) is int:
        least = LEAST.get(name, 0)
        if not least <= value <= MOST and not (name == "slot" and value < 0):  # `pair` checks slots
            raise UsageError(f"{_short(value)} is out of range", where, f"Give {least} to {MOST}.")
    if type(value) is float:
        if not isfinite(value):
            raise UsageError(f"{value} is no number to train with", where, f"For example {default!r}.")
        if value < 0 and name not in SIGNED:
            raise UsageError(f"{value:g} is negative", where, f"Give 0 or more, for example {default!r}.")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        return "so large a number"
    return text if len(text) < 80 else f"{text[:70]} …"


def base_defaults(base: str) -> dict[str, Settings]:
    """A base's own defaults: method → settings, from `unbraid.toml` in its folder. Empty if there is no such file."""
    folder = Path(str(files("unbraid.bases").joinpath("icons"))) if base == "icons" else Path(base)
    return _read(folder / "unbraid.toml") if (folder / "unbraid.toml").is_file() else {}


def parse_set(pairs: list[str]) -> Settings:
    """Parse `key=value` strings. TOML values (numbers, true, "text") are read as such, others as plain text."""
    out: Settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} is not key=value", "--set", "For example: --set rank=16.")
        try:
            out[key.strip()] = tomllib.loads(f"x = {value}")["x"]
        except (ValueError, RecursionError):  # not TOML, a number with too many digits, or nested too deeply
            out[key.strip()] = value
    return out


def _read(path: Path) -> dict[str, Any]:
    return read_toml(path, "Settings as name = value, or one table per method, such as [unziplora] rank = 16.")
