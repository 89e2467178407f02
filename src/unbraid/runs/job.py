"""The job of a run, and the records that a run writes: run.toml and the metadata of its LoRAs."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from math import cos, pi
from pathlib import Path
from string import Formatter
from typing import Any, Literal, TypedDict, Unpack, cast, get_args

from PIL import Image

from unbraid.bases.presets import AS_IT_IS, Loading
from unbraid.common.atomic import sha256
from unbraid.common.errors import UsageError, suggestion
from unbraid.core.selectors import Blocks
from unbraid.core.state import Step
from unbraid.files.formats.metadata import card
from unbraid.images.crop import open_image
from unbraid.methods import METHODS
from unbraid.runs import folder
from unbraid.runs.settings import BATCH_SIZES, RESOLUTIONS, WARM_UPS, Settings, base_defaults, counted

RARE, MOST_ALPHA = "sks", 10_000

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Training:
    """How a run is trained, apart from the settings of its method."""

    resolution: int = 0  # pixels: pictures are scaled to the area of a square with this side; 0: the base's own
    schedule: Schedule = "constant"  # how the learning rates fall to 0: not at all, linearly, or along half a cosine
    warm_up: int = 0  # steps in which the learning rates rise to their full value
    batch_size: int = 1  # samples of each branch in a step; as many share a pass as there is memory for
    alpha: float = 0.0  # new adapters are multiplied by alpha / rank; 0: by 1
    templates: Mapping[str, str] = field(
        default_factory=dict
    )  # role → template of its prompt, in place of the method's
    blocks: Blocks = field(default_factory=dict)  # which layers serve content and style; empty: as known for the base

    def given(self) -> dict[str, Any]:
        """The values that are not the defaults."""
        usual = asdict(Training())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    def factor(self, step: int, steps: int) -> float:
        """The factor on the learning rates in a step of so many."""
        rise = min(1.0, (step + 1) / (self.warm_up + 1))
        left = 1 - max(0, step - self.warm_up) / max(1, steps - self.warm_up)
        return rise * {"constant": 1.0, "linear": left, "cosine": (1 - cos(pi * left)) / 2}[self.schedule]


class TrainingOptions(TypedDict, total=False):
    """The fields of `Training` that users give, not yet checked."""

    resolution: int
    schedule: str
    warm_up: int
    batch_size: int
    alpha: float
    templates: Mapping[str, str]


def checked_training(**given: Unpack[TrainingOptions]) -> Training:
    """The values as a `Training`. UsageError if one is out of its range."""
    if (schedule := given.get("schedule", "constant")) not in get_args(Schedule):
        raise UsageError(f"there is no schedule {schedule!r}", "--schedule", suggestion(schedule, get_args(Schedule)))
    for name, allowed in (("resolution", RESOLUTIONS), ("warm_up", WARM_UPS), ("batch_size", BATCH_SIZES)):
        if name in given:
            counted(name.replace("_", "-"), given[name], allowed)
    if not 0 <= given.get("alpha", 0) <= MOST_ALPHA:
        raise UsageError(f"is {given.get('alpha')}", "--alpha", f"Give 0 (as the rank) to {MOST_ALPHA}.")
    return Training(**cast(Any, given))


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from, and how."""

    images: Mapping[str, tuple[Path, ...]]  # role → files
    words: Mapping[str, str]  # what fills the prompt templates
    captions: Mapping[Path, str] = field(default_factory=dict)  # image → its own prompts, one a line, if it has any
    loras: Mapping[str, Path] = field(default_factory=dict)  # role → file, for methods that start from LoRAs
    training: Training = Training()


@dataclass(frozen=True)
class Extras:
    """What a run writes beside the weights of its LoRAs."""

    previews: int = 3  # preview sheets during training; 0: no pictures at all
    thumbnail: bool = True  # whether the LoRAs hold a small copy of the first picture
    metadata: bool = True  # whether the LoRAs record prompts, settings and base


@dataclass(frozen=True)
class Job:
    """A training job with all values resolved, as run.toml records it."""

    method: str
    data: TrainingData
    settings: Settings
    out: Path
    base: str = "icons"
    loading: Loading = AS_IT_IS
    seed: int = 0
    extras: Extras = Extras()
    notes: tuple[str, ...] = field(default=(), compare=False)  # are shown before the run begins


@dataclass(frozen=True)
class Progress:
    """One event of a run: a training step, a file that was written, a warning, or a note.

    `done` of `total` steps are trained. `undone`: a preview, plot or sheet could not be made; training goes on."""

    done: int
    total: int
    step: Step | None = None
    file: Path | None = None
    warning: str = ""
    undone: bool = False
    note: str = ""


def prompts_of(job: Job) -> dict[str, str]:
    """Role → prompt, from the method's templates and the job's words. UsageError for an empty word."""
    words = {"rare": RARE, **job.data.words}
    for name, value in words.items():
        if not value.strip():
            raise UsageError("is empty", f"--{name.replace('_', '-')}", "Say in a word or two what it is.")
    templates = METHODS[job.method].prompts or {role: f"{{{role}}}" for role in job.data.words if role != "rare"}
    templates = {**templates, **_checked_templates(job.data.training.templates, templates, words)}
    known = {role: text for role, text in templates.items() if all(name in words for name in _fields(text))}
    if base_defaults(job.base).get("prompts", {}).get("article") != "a":
        known = {role: with_article(template, words) for role, template in known.items()}
    return {role: template.format(**words) for role, template in known.items()}


def _checked_templates(
    given: Mapping[str, str], known: Mapping[str, str], words: Mapping[str, str]
) -> Mapping[str, str]:
    """The templates that were given. UsageError for a role that the method has not, or a word that nobody gave."""
    for role, text in given.items():
        where = f"--template {role[:80]}"
        if role not in known:
            raise UsageError(f"the method has no prompt {role[:80]!r}", where, suggestion(role, list(known)))
        try:
            unknown = [name for _, name, _, _ in Formatter().parse(text) if name is not None and name not in words]
        except ValueError as error:
            raise UsageError(
                f"{text[:80]!r} is no template ({error})", where, "Braces hold words: {subject}."
            ) from error
        if unknown or not text.strip():
            what = f"there is no word {{{unknown[0][:80]}}}" if unknown else "is empty"
            raise UsageError(what, where, f"Words are: {', '.join(f'{{{word}}}' for word in words)}.")
    return given


def with_article(template: str, words: Mapping[str, str]) -> str:
    """A template with `an` in place of `a` before a word that begins with a vowel: `a {subject}` for an owl."""

    def article(found: re.Match[str]) -> str:
        word = words[found[1]].strip().lower()
        vowel = word.startswith(tuple("aeiou")) and not word.startswith(("uni", "use", "eu", "one"))
        return f"an {{{found[1]}}}" if vowel else found[0]

    return re.sub(r"\ba \{(\w+)\}", article, template)


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def opened_images(job: Job) -> dict[str, list[Image.Image]]:
    return {role: [open_image(path) for path in paths] for role, paths in job.data.images.items()}


def finished(job: Job) -> bool:
    """Whether a run is finished: its folder has all the LoRAs, and no saved state to resume from."""
    stems = METHODS[job.method].outputs(job.settings)
    there = all((job.out / f"{stem}.safetensors").exists() for stem in stems)
    return there and not (job.out / folder.STATE).exists()


def record(job: Job, texts: Mapping[str, str]) -> dict[str, Any]:
    """The content of run.toml. The file can be given as --config: its table of the method's name has the settings."""
    data = job.data
    images = {role: [str(path) for path in paths] for role, paths in data.images.items()}
    hashes = {role: [sha256(path) for path in paths] for role, paths in data.images.items()}
    hashes |= {f"lora {role}": [sha256(path)] for role, path in data.loras.items()}
    return {
        "unbraid": version("unbraid"),
        "method": job.method,
        "base": job.base,
        **{key: value for key, value in asdict(job.loading).items() if value != getattr(AS_IT_IS, key)},
        "seed": job.seed,
        "previews": job.extras.previews,
        **data.training.given(),
        **{name: False for name in ("thumbnail", "metadata") if not getattr(job.extras, name)},
        "words": dict(data.words),
        "images": images,
        "sha256": hashes,
        **({"loras": {role: str(path) for role, path in data.loras.items()}} if data.loras else {}),
        **({"captions": {str(path): text for path, text in data.captions.items()}} if data.captions else {}),
        "prompts": dict(texts),
        job.method: dict(job.settings),
    }


def metadata(
    job: Job, steps: int, stem: str, prompt: str, texts: Mapping[str, str], shown: Image.Image | None
) -> dict[str, str]:
    """The metadata of a LoRA file, in the keys that other tools read (ss_*, ModelSpec) and in our own (unbraid.*)."""
    if not job.extras.metadata:
        return {}
    style = job.data.words.get("style") if METHODS[job.method].prompts else None
    base = Path(job.base).name if Path(job.base).exists() else job.base  # for a local path only its last part
    return {
        **card(
            f"{stem} of {texts['both']}",
            f"in {style} style" if style and stem == "style" else prompt,
            stem.capitalize(),
            thumbnail=shown if job.extras.thumbnail else None,
        ),
        "modelspec.date": datetime.now(UTC).date().isoformat(),
        "ss_output_name": stem,
        "ss_sd_model_name": base,
        "ss_seed": str(job.seed),
        "ss_steps": str(steps),
        "unbraid.method": job.method,
        "unbraid.prompt": prompt,
        "unbraid.base": base,
        **({"unbraid.style": style} if style else {}),
        "unbraid.settings": json.dumps(job.settings),
    }
