"""For each method, the shortest run that still changes what a base draws. The self-test and tests of bases use it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbraid.methods import METHODS
from unbraid.methods.b4m import KINDS, Kind
from unbraid.runs.api import learn_job, pair_job, split_job, zip_job
from unbraid.runs.break_make import break_job, make_job
from unbraid.runs.job import Job
from unbraid.runs.settings import open_settings

USUAL: Mapping[str, Any] = {"rank": 2, "steps": 2, "lr": 1e-2}
FIRST = "unziplora"  # methods that start from LoRAs get the LoRAs of this one


@dataclass(frozen=True)
class Material:
    """The inputs of the runs.

    `partners`: kind of a module → a folder with pictures of the other kind and their prompts."""

    before: Path
    after: Path
    partners: Mapping[str, Path]
    subject: str = "cat"
    loras: Mapping[str, Path] = field(default_factory=dict)  # role → file
    modules: Mapping[str, Path] = field(default_factory=dict)  # kind → file of `break`

    @property
    def images(self) -> dict[str, str | Path]:
        return {"content": self.before, "style": self.after}

    @property
    def words(self) -> dict[str, str]:
        return {"subject": self.subject, "style": "ink"}


def settings(method: str) -> dict[str, Any]:
    """Settings for two steps of training, after which the method's LoRAs are not zero."""
    entry = METHODS[method]
    return {name: value for name, value in USUAL.items() if name in open_settings(entry)} | dict(entry.inputs.shortest)


def needs(method: str) -> frozenset[str]:
    """The kinds of files (`Input.kind`) that the method needs and other methods have to make first."""
    return frozenset(one.kind for one in METHODS[method].inputs.of_kind("LoRA", "module"))


def in_order() -> list[str]:
    """All methods, sorted so that those that need files of others come after them."""
    return sorted(METHODS, key=lambda method: bool(needs(method)))


def jobs(method: str, material: Material, folder: Path, **options: Any) -> list[Job]:
    """The jobs of a method, each in its own folder in `folder`: one, or one per kind of module.

    `options`: further options of the verb."""
    return VERBS[METHODS[method].verb](method, material, folder, {**settings(method), **options})


def _split(method: str, material: Material, out: Path, options: dict[str, Any]) -> list[Job]:
    given = {**material.words, "out": out / method, **options}
    return [split_job(material.before, **given, method=method)]


def _pair(method: str, material: Material, out: Path, options: dict[str, Any]) -> list[Job]:
    given = {**material.words, "out": out / method, **options}
    return [pair_job(material.before, material.after, **given, method=method)]


def _learn(method: str, material: Material, out: Path, options: dict[str, Any]) -> list[Job]:
    given = {"prompt": f"a sks {material.subject}", "out": out / method, **options}
    return [learn_job(material.before, **given, method=method)]


def _zip(method: str, material: Material, out: Path, options: dict[str, Any]) -> list[Job]:
    given = {"images": material.images, "out": out / method, **options}
    return [zip_job(material.loras["content"], material.loras["style"], **given, method=method)]


def _break(method: str, material: Material, out: Path, options: dict[str, Any]) -> list[Job]:
    prompts = {"content": f"a sks {material.subject}", "style": "a dog in ink style"}

    def one(kind: Kind) -> Job:
        given = {"partners": material.partners[kind], "out": out / f"{method}-{kind}", **options}
        return break_job(material.images[kind], kind=kind, prompt=prompts[kind], **given, method=method)

    return [one(kind) for kind in KINDS]


def _make(method: str, material: Material, out: Path, options: dict[str, Any]) -> list[Job]:
    given = {"images": material.images, "out": out / method, **options}
    return [make_job(material.modules["content"], material.modules["style"], **given, method=method)]


VERBS: Mapping[str, Callable[[str, Material, Path, dict[str, Any]], list[Job]]] = {
    "split": _split,
    "pair": _pair,
    "learn": _learn,
    "zip": _zip,
    "break": _break,
    "make": _make,
}
