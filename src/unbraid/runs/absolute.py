"""The paths of a run's record as absolute ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbraid.runs.preferences import EMBEDDED


def absolute(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with absolute paths, as in job.toml, so that it can be run from anywhere."""

    def whole(path: str) -> str:
        return str(Path(path).absolute())

    found = dict(record)
    found["images"] = {role: [whole(path) for path in paths] for role, paths in record["images"].items()}
    if "captions" in found:
        found["captions"] = {whole(path): text for path, text in found["captions"].items()}
    if "loras" in found:
        found["loras"] = {role: whole(path) for role, path in found["loras"].items()}
    return found | {name: absolute_base(record[name]) for name in ("base", "vae", "parts") if name in record}


def absolute_base(base: str) -> str:
    """A base, or a part of one, that is a folder or a file by its absolute path; hub ids and the embedded one by their names."""
    return str(Path(base).absolute()) if base not in ("", EMBEDDED) and Path(base).exists() else base
