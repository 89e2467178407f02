"""Settings saved as files: `presets/NAME.toml`, with a table per method. `unbraid split … --config FILE` reads them, too."""

from collections.abc import Mapping
from typing import Any

import tomli_w

from unbraid.common.atomic import atomic, read_toml
from unbraid.common.errors import UsageError, printable
from unbraid.runs.settings import parse_set
from unbraid.studio.safety import NAME, Home, slug


def names(home: Home) -> list[str]:
    """The presets of the studio's folder."""
    return sorted(path.stem for path in (home.folder / "presets").glob("*.toml") if NAME.fullmatch(path.stem))


def save(home: Home, wish: str, method: str, settings: Mapping[str, str]) -> str:
    """Save a method's settings, written as after --set, under a name like `wish`. Tables of other methods stay.

    Returns the name. UsageError if there is no setting, or no name."""
    if not settings:
        raise UsageError("there is nothing to save: all settings are as usual", "Preset", "Change one first.")
    if not wish:
        raise UsageError("it has no name", "Preset", "Type one, such as quick.")
    name = slug(wish)
    tables = _tables(home, name) if name in names(home) else {}
    with atomic(home.folder / "presets" / f"{name}.toml") as part:
        pairs = [f"{key}={value}" for key, value in settings.items()]
        part.write_text(tomli_w.dumps({**tables, method: parse_set(pairs)}), "utf-8")
    return name


def load(home: Home, name: object, method: str) -> dict[str, Any]:
    """The settings that a preset has for a method, as the fields of a form hold them. UsageError if it has none."""
    if name not in names(home):
        raise UsageError("there is no such preset", printable(name, 60), "Choose one of the list.")
    table = _tables(home, str(name)).get(method)
    if not isinstance(table, dict):
        raise UsageError(f"it has no settings of {method}", str(name), "Choose another preset, or another method.")
    return {key: str(value).lower() if isinstance(value, bool) else value for key, value in table.items()}


def _tables(home: Home, name: str) -> dict[str, Any]:
    path = home.folder / "presets" / f"{name}.toml"
    if not home.contains(path):
        raise UsageError("leads out of the studio's folder", name, "Choose another preset.")
    return read_toml(path, "A table per method, such as [unziplora] rank = 16.")
