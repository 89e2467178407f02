"""The verbs in Python, with the names and settings of the command line."""

import builtins
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

from PIL.Image import Image

from unbraid.bases.pipeline import location
from unbraid.bases.presets import AS_IT_IS
from unbraid.bases.recognised import default_parts, family_preset, kind_of_file
from unbraid.common.errors import UsageError
from unbraid.files.lora_file import read
from unbraid.images.captions import caption_of, captions_of
from unbraid.images.folders import look, matched, unused
from unbraid.images.given import Source, as_file
from unbraid.methods import METHODS
from unbraid.methods.pair import free_slot, numbered
from unbraid.runs import folder
from unbraid.runs.drawing import forget_base
from unbraid.runs.job import RARE, Extras, Job, Progress, TrainingData, TrainingOptions, checked_training
from unbraid.runs.options import LearnOptions, PairOptions, SplitOptions, ZipOptions
from unbraid.runs.preferences import default_base
from unbraid.runs.roles import roles_of_layers
from unbraid.runs.run import run
from unbraid.runs.run_options import RunOptions, separate
from unbraid.runs.run_path import Run
from unbraid.runs.settings import PREVIEWS, SEEDS, counted, documented, resolve
from unbraid.sampling.uses import own_prompt


@documented("split")
def split_job(
    image: Source,
    *,
    subject: str,
    style: str,
    blocks: str | Path = "",
    method: str = "unziplora",
    **options: Unpack[SplitOptions],
) -> Job:
    """One image → `content.safetensors` and `style.safetensors`.

    `blocks`: which layers serve content and which style, a published table by name or a TOML file
    (`unbraid.core.selectors.open_blocks`); by default what is known for the base, or what the table `blocks` of its unbraid.toml
    states."""
    run_options, settings = separate(options)
    todo = job([image], {"subject": subject, "style": style}, settings, method=method, **run_options)
    if (count := len(todo.data.images["image"])) > 1:
        fix = "Give one picture of it. `unbraid learn` takes a folder."
        raise UsageError(f"a folder of {count} pictures, where one picture is split", image, fix)
    roles = roles_of_layers(todo, str(blocks))
    training = replace(todo.data.training, blocks=roles)
    return replace(todo, data=replace(todo.data, training=training))


@documented("learn")
def learn_job(
    images: Source | Sequence[Source],
    *,
    prompt: str,
    class_prompt: str = "",
    class_images: str | Path | None = None,
    from_: str | Path | None = None,
    method: str = "dreambooth",
    **options: Unpack[LearnOptions],
) -> Job:
    """Images of one thing → `lora.safetensors`.

    Learns from each image under `prompt`, or under a line of NAME.txt or NAME.caption beside NAME.png. With a `class_prompt`
    the prior is preserved: on `class_images`, or on pictures that the base draws of it. `from_`: a LoRA to go on from, in place of a
    fresh one: its modules, ranks and strengths (alpha, folded into the factors)."""
    words, roles = {"prompt": prompt}, {"image": [images] if isinstance(images, str | Path | Image) else list(images)}
    run_options, settings = separate(options)
    if class_prompt:
        words["class_prompt"] = class_prompt
        settings = {"prior_weight": 1.0, **settings}
    if class_images:
        roles["prior"] = [class_images]
    if from_:
        if taken := [key for key in ("rank", "targets") if key in settings]:
            raise UsageError(f"{taken[0]!r} is the LoRA's own", "--from", "Leave it out.")
        settings["rank"] = max(len(lora.down) for lora in read(Path(from_)).modules.values())
    loras = {"lora": Path(from_)} if from_ else {}
    todo = job(roles, words, settings, method=method, loras=loras, **run_options)
    if bool(todo.settings.get("prior_weight")) != bool(class_prompt):
        raise UsageError("prior preservation needs a prompt of the class", "--class-prompt", "For example: a dog.")
    captions = {path: "\n".join(lines) for path in todo.data.images["image"] if (lines := captions_of(path))}
    return replace(todo, data=replace(todo.data, captions=captions))


@documented("pair")
def pair_job(
    before: Source,
    after: Source,
    *,
    subject: str,
    style: str,
    beside: Sequence[str | Path] = (),
    method: str = "pair",
    **options: Unpack[PairOptions],
) -> Job:
    """A picture before and after → `style.safetensors` and `content.safetensors`; of two folders, the style alone.

    Learns what a style does to a picture. Folders are paired by name; NAME.txt beside a picture before says in a word
    or two what that one shows, in place of `subject`. `beside`: other styles, which this one shall not meet."""
    before, after = as_file(before), as_file(after)
    couples = matched(before, after)
    files: dict[str, Sequence[str | Path]] = {}
    captions: dict[Path, str] = {}
    for (first, second), number in builtins.zip(couples, numbered(len(couples)), strict=True):
        files |= {f"before{number}": [first], f"after{number}": [second]}
        if shown := caption_of(first):
            rare = options.get("rare", RARE)
            captions |= {first: f"a {rare} {shown}", second: f"a {rare} {shown} in {style} style"}
    run_options, settings = separate(options)
    run_options["out"] = run_options.get("out") or Path("runs") / f"{couples[0][1].stem}-{method}"
    settings["pairs"] = len(couples)
    todo = job(files, {"subject": subject, "style": style}, settings, method=method, **run_options)
    if beside:
        if not todo.settings.get("orthogonal"):
            raise UsageError("needs orthogonal rows", "--beside", "Use --method pair with orthogonal=true.")
        others = {Path(one): read(Path(one)).modules for one in beside}
        slot = free_slot(others, todo.settings["rank"], options.get("slot"))
        todo = replace(todo, settings={**todo.settings, "slot": slot})
    data = replace(todo.data, captions=captions)
    return replace(todo, data=data, notes=unused([before, after]))


@documented("zip")
def zip_job(
    content: str | Path,
    style: str | Path,
    *,
    also: Sequence[str | Path] = (),
    images: Mapping[str, str | Path] | None = None,
    prompts: Mapping[str, str] | None = None,
    method: str = "ziplora",
    **options: Unpack[ZipOptions],
) -> Job:
    """LoRAs → the same LoRAs without interference, one file each, or `merged.safetensors` with `single=True`.

    Zips two LoRAs, or more: roles `content`, `style`, `lora3`, … `images`: role → the pictures (a file or a folder)
    that the LoRA was trained on; without them it draws its own. `prompts`: role → the prompt that it was trained with,
    if its file does not say; `both`: what to draw for looking at."""
    files = [Path(one) for one in (content, style, *also)]
    loras = {("content", "style")[i] if i < 2 else f"lora{i + 1}": file for i, file in enumerate(files)}
    words = {role: (prompts or {}).get(role) or own_prompt(file, read(file)) for role, file in loras.items()}
    words["both"] = (prompts or {}).get("both") or ", ".join(words.values())
    found = {role: [where] for role, where in (images or {}).items()}
    run_options, settings = separate(options)
    run_options["out"] = run_options.get("out") or Path("runs") / f"{files[0].stem}-{files[1].stem}-{method}"
    settings["roles"] = tuple(loras)
    return job(found, words, settings, method=method, loras=loras, **run_options)


def job(
    images: Sequence[Source] | Mapping[str, Sequence[Source]],
    words: Mapping[str, str],
    settings: Mapping[str, object],
    *,
    method: str,
    loras: Mapping[str, Path] | None = None,
    **options: Unpack[RunOptions],
) -> Job:
    """Make a job from plain values; the verbs call this. `images`: role → files, or a list for a method with one role.

    `words`: what fills the prompt templates. `settings`: those of the method (`unbraid explain METHOD`). `loras`: role →
    file, for methods that start from LoRAs. `options`: see `RunOptions`."""
    roles = images if isinstance(images, Mapping) else {"image": images}
    looked = {role: [look(as_file(image)) for image in some] for role, some in roles.items()}
    files = {role: tuple(file for one in some for file in one.files) for role, some in looked.items()}
    notes = dict.fromkeys(line for some in looked.values() for one in some for line in one.unused)
    base, out, rare = options.get("base") or default_base(), options.get("out"), options.get("rare", RARE)
    where = Path(out) if out else Path("runs") / f"{next(iter(files.values()))[0].stem}-{method}"
    location(base)  # UsageError if there is no such base
    loading = replace(AS_IT_IS, **{name: options[name] for name in asdict(AS_IT_IS) if name in options})
    loading = replace(
        loading,
        timesteps=loading.timesteps or family_preset(base, method).timesteps,
        parts=loading.parts or default_parts(kind_of_file(base)),
    )
    training = checked_training(**{name: options[name] for name in TrainingOptions.__annotations__ if name in options})
    if rare != RARE:
        if "{rare}" not in " ".join(METHODS[method].prompts.values() if method in METHODS else ()):
            raise UsageError(f"{method} has no rare token in its prompts", "--rare", "Write the token into the prompt.")
        words = {**words, "rare": rare}
    _ = loading.preset  # UsageError if there is no such preset
    return Job(
        method,
        TrainingData(files, words, loras=loras or {}, training=training),
        resolve(method, base, options.get("config"), settings),
        where,
        base,
        loading,
        counted("seed", options.get("seed", 0), SEEDS),
        Extras(
            counted("previews", options.get("previews", 3), PREVIEWS),
            options.get("thumbnail", True),
            options.get("metadata", True),
        ),
        tuple(notes),
    )


def finish(todo: Job, progress: Callable[[Progress], None] | None = None) -> Run:
    """Run a job to its end, and return its folder. `progress` is called with every event of the run."""
    forget_base()
    for event in run(todo):
        if progress:
            progress(event)
        if event.undone:
            warnings.warn(event.warning, RuntimeWarning, stacklevel=3)
    return Run(todo.out)


def finished(make_job: Callable[..., Job]) -> Callable[..., Run]:
    """Turn a function that makes a job into one that also runs it to its end, and returns the run folder."""

    def verb(*given: Any, progress: Callable[[Progress], None] | None = None, **options: Any) -> Run:
        todo = make_job(*given, **options)
        return finish(todo if options.get("out") else replace(todo, out=folder.free(todo.out)), progress)

    verb.__name__ = verb.__qualname__ = make_job.__name__.removesuffix("_job")
    verb.__doc__ = f"{make_job.__doc__}\n\nTrains to the end, and returns the run folder. `progress`: see `finish`."
    return verb


split = finished(split_job)
learn = finished(learn_job)
pair = finished(pair_job)
zip = finished(zip_job)
