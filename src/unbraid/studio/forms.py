"""What a form asks for, made from the methods' entries; and from a filled form to a job and its command line."""

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from unbraid.bases.configuration import denoiser_config
from unbraid.common.errors import UsageError
from unbraid.methods import ENTRIES, METHODS
from unbraid.methods.entry import Entry
from unbraid.runs.api import learn_job, pair_job, split_job, zip_job
from unbraid.runs.checks import check
from unbraid.runs.job import Job
from unbraid.runs.job_folder import read_done
from unbraid.runs.memory import memory_line
from unbraid.runs.settings import base_defaults, descriptions, open_settings, parse_set
from unbraid.studio import queue
from unbraid.studio.safety import Home, checked_text

JOBS: Mapping[str, Callable[..., Job]] = {"split": split_job, "pair": pair_job, "zip": zip_job, "learn": learn_job}


@dataclass(frozen=True)
class Setting:
    """One setting of a method, as a form shows it. `choices`: what can be chosen; empty where it is typed."""

    name: str
    about: str
    kind: Literal["whole number", "number", "text", "choice"]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A filled form. `words`: option → text; `settings`: those that were changed, as they are written after --set."""

    verb: str
    inputs: tuple[Path, ...]
    words: Mapping[str, str]
    method: str
    base: str
    seed: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)

    def pairs(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.settings.items()]


def methods(verb: str) -> list[Entry]:
    """The methods of a verb; the first one is the default."""
    return [entry for entry in ENTRIES if entry.verb == verb]


def settings_of(entry: Entry) -> list[Setting]:
    """All settings of a method that users can give."""
    about = descriptions(entry)
    return [_setting(name, about[name], one.annotation) for name, one in open_settings(entry).items()]


def _setting(name: str, about: str, kind: Any) -> Setting:
    text = about[:1].upper() + about[1:]
    if kind is bool:
        return Setting(name, text, "choice", ("true", "false"))
    if get_origin(kind) is Literal:
        return Setting(name, text, "choice", tuple(map(str, get_args(kind))))
    return Setting(name, text, "whole number" if kind is int else "text" if kind is str else "number")


def usual(entry: Entry, base: str) -> dict[str, str]:
    """Setting → its value on a base if nothing is typed into its field, as text."""
    own = base_defaults(base).get(entry.name, {})
    found = {name: own.get(name, one.default) for name, one in open_settings(entry).items()}
    return {name: str(value).lower() if isinstance(value, bool) else f"{value}" for name, value in found.items()}


def changed(entry: Entry, values: Mapping[str, Any]) -> dict[str, str]:
    """The settings that a form's fields change, as text for --set. Empty fields are left out.

    UsageError for a value of another kind than the form offers."""
    out = {}
    for one in settings_of(entry):
        value = values.get(one.name)
        if value is None or value == "":
            continue
        if one.kind == "choice":
            if value not in one.choices:
                raise UsageError("is none of the choices", one.name, f"Choose: {', '.join(one.choices)}.")
            out[one.name] = str(value)
        elif one.kind == "text":
            out[one.name] = checked_text(value, one.name)
        else:
            out[one.name] = _number(one, value)
    return out


def _number(one: Setting, value: object) -> str:
    """A typed number, as it is written after --set. UsageError if it is none, or is not whole where it must be."""
    try:
        number = float("" if isinstance(value, bool) or not isinstance(value, int | float | str) else value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError("is no number", one.name, "Type a number, or nothing.")
    if one.kind == "number":
        return repr(number)
    if number != int(number):
        raise UsageError(f"{number:g} is no whole number", one.name, "Leave out what is behind the point.")
    return str(int(number))


def whole(value: object, label: str) -> int:
    """A form's number as an int. UsageError if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise UsageError("is no whole number", label, "Type one, such as 0.")
    return int(value)


def job_of(request: Request, out: Path) -> Job:
    """The job that a form describes, checked as the command line checks it. UsageError for what is wrong with it."""
    given: dict[str, Any] = {**request.words, **parse_set(request.pairs()), "out": out}
    if request.verb == "zip":  # its Python function takes the prompts of all LoRAs in one argument
        given["prompts"] = {name.removesuffix("_prompt"): given.pop(name) for name in request.words}
    job = JOBS[request.verb](*request.inputs, **given, method=request.method, base=request.base, seed=request.seed)
    check(job, resume=False)
    METHODS[job.method].make(denoiser_config(job.base)[0].blocks, **job.settings)  # refuses settings that do not fit
    return job


def command(request: Request, out: Path) -> list[str]:
    """The same on the command line: what follows `unbraid`."""
    options = {**request.words, "method": request.method, "base": request.base, "seed": str(request.seed)}
    words = [request.verb, *map(str, request.inputs)]
    words += [f"--{name.replace('_', '-')}={text}" for name, text in options.items() if text]
    words += [word for pair in request.pairs() for word in ("--set", pair)]
    return [*words, f"--out={out}"]


def enqueue(home: Home, request: Request, name: str = "") -> Path:
    """Check a form, make a folder for its run, and put it into the queue. Returns the folder."""
    texts = {label: checked_text(text, label) for label, text in request.words.items()}
    request = Request(request.verb, request.inputs, texts, request.method, request.base, request.seed, request.settings)
    job = job_of(request, home.runs / "-")
    folder = home.new_run(checked_text(name, "name") or f"{'-'.join(texts.values()) or request.inputs[0].stem}")
    queue.add(folder, job)
    return folder


def preview(home: Home, request: Request) -> str:
    """What a form would do, in a few lines: memory, time, and the command line."""
    job = job_of(request, home.runs / "-")
    seconds = seconds_per_step(home, request.method, request.base)
    steps = job.settings.get("steps", 0)
    time = f"about {duration(seconds * steps)} for {steps} steps, as earlier runs here" if seconds else "not known yet"
    shown = shlex.join(["unbraid", *command(request, Path("OUT"))])
    return f"{memory_line(job)}\n\ntime, estimated: {time}\n\nThe same on the command line:\n\n```\n{shown}\n```"


def seconds_per_step(home: Home, method: str, base: str) -> float | None:
    """How long a step took in the newest finished run of this method and base, with its previews and saves."""
    for run in queue.runs(home):
        record, figures = queue.record(run.folder), read_done(run.folder)
        if figures.get("seconds") and (record.get("method"), record.get("base")) == (method, base):
            return figures["seconds"] / figures["steps"]
    return None


def duration(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
