"""A finished run as others shall see it: its LoRA files, their prompts, and pictures that they drew. No path of this machine."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unbraid.common.atomic import read_toml
from unbraid.common.errors import UsageError
from unbraid.files.formats.blocks import Family
from unbraid.files.formats.header import catalogue, read_header
from unbraid.files.made_for import BASE
from unbraid.methods import METHODS
from unbraid.runs import folder

MOST_PICTURES = 12
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NO_RUN = "Give the folder of a finished run, such as runs/octopus-unziplora."


@dataclass(frozen=True)
class Published:
    """What is published of a run.

    `base`: as recorded: `icons`, a hub id, or a path. `triggers`: LoRA file → the words that call it. `prompt`: of all files
    together. `style`: what the style is called, or "". `pictures`: file → its prompt."""

    method: str
    base: str
    family: Family
    triggers: Mapping[Path, str]
    prompt: str
    style: str
    settings: Mapping[str, Any]
    pictures: Mapping[Path, str]

    @property
    def hub_base(self) -> str:
        """The base as an id of the hub; "" for `icons` and for files of this machine."""
        return self.base if HUB_ID.fullmatch(self.base) and not Path(self.base).exists() else ""


def published(run: Path, pictures: Path | None = None) -> Published:
    """Open a finished run. `pictures`: a folder with more that its LoRAs drew, beside those in the run folder.

    UsageError if there is no run, if it is not finished, or if a file of it is damaged."""
    if not run.is_dir():
        raise UsageError("is a file, not a run folder" if run.is_file() else "there is no such run", run, NO_RUN)
    if pictures and not pictures.is_dir():
        raise UsageError("there is no such folder", pictures, "Give a folder of pictures that `generate` drew.")
    there = (run / folder.RECORD).exists()
    recorded = read_toml(run / folder.RECORD, "The run's record is damaged.") if there else _joined(run)
    triggers = dict[Path, str]()
    family: Family = "unknown"
    for file, prompt in _files(run, recorded).items():
        header = read_header(file)
        family = catalogue(header).verdict.family
        triggers[file] = header.metadata.get("modelspec.trigger_phrase") or prompt
    prompt = recorded.get("prompts", {}).get("both") or next(iter(triggers.values()))
    return Published(
        recorded["method"],
        str(recorded.get("base", "")),
        family,
        triggers,
        prompt,
        str(recorded.get("words", {}).get("style", "")),
        recorded[recorded["method"]],
        _pictures([run, *([pictures] if pictures else [])], {file.name for file in triggers})
        or _last_preview(run, prompt),
    )


def _joined(run: Path) -> dict[str, Any]:
    """The record of modules that `make` joined without training: that is in the file alone. UsageError if it is no such folder."""
    file = run / "merged.safetensors"
    found = read_header(file).metadata if file.is_file() else {}
    if found.get("unbraid.method") != "make":
        raise UsageError("there is no run in this folder", run, NO_RUN)
    prompt = found.get("unbraid.prompt", "")
    return {"method": "make", "base": found.get(BASE, ""), "prompts": {"both": prompt}, "make": {"steps": 0}}


def _files(run: Path, recorded: Mapping[str, Any]) -> dict[Path, str]:
    """LoRA file → its prompt. UsageError if the run's method is not known, or if one of its files is missing."""
    method = recorded.get("method")
    if method not in METHODS or not isinstance(recorded.get(method), dict):
        raise UsageError(
            f"a run of an unknown method, {method!r}", run / folder.RECORD, "Use the unbraid that made it."
        )
    try:
        outputs = METHODS[method].outputs(recorded[method])
    except (KeyError, TypeError) as error:
        raise UsageError("the run's record is damaged", run / folder.RECORD) from error
    files = {
        run / f"{stem}.safetensors": recorded.get("prompts", {}).get(one.prompt, "") for stem, one in outputs.items()
    }
    if (run / folder.STATE).exists() or not all(file.is_file() for file in files):
        raise UsageError("this run is not finished", run, "Go on with it: the same command with --resume.")
    return files


def _pictures(places: list[Path], loras: set[str]) -> dict[Path, str]:
    """Picture that `generate` drew with these LoRA files → its prompt; the first `MOST_PICTURES`."""
    found = ((path, _drawn_by(path, loras)) for place in places for path in sorted(place.rglob("*.png")))
    return dict(
        one for one, _ in zip(((path, text) for path, text in found if text), range(MOST_PICTURES), strict=False)
    )


def _drawn_by(path: Path, loras: set[str]) -> str:
    """The prompt in a picture's own record; "" if it has none, or if none of the LoRA files drew it."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, Image.DecompressionBombError):
        with Image.open(path) as image:
            record: Any = json.loads(image.info.get("unbraid", "{}"))
        if loras & {one["file"] for kind in ("loras", "styles") for one in record.get(kind, ())}:
            return str(record["prompt"])
    return ""


def _last_preview(run: Path, prompt: str) -> dict[Path, str]:
    """The last preview sheet, which shows no picture that the run was trained on; nothing if there is none."""
    return dict.fromkeys(sorted((run / "previews").glob("step_*.png"))[-1:], prompt)
