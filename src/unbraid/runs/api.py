"""The verbs in Python, with the names and settings of the command line."""

import builtins
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from unbraid.bases.base import load
from unbraid.bases.presets import Loading
from unbraid.common.errors import UsageError
from unbraid.files.lora_file import read
from unbraid.images.captions import caption_of, captions_of
from unbraid.images.folders import look, matched, unused
from unbraid.methods.pair import free_slot, numbered
from unbraid.runs.job import RARE, Job
from unbraid.runs.run import Progress, run
from unbraid.runs.settings import PREVIEWS, SEEDS, counted, resolve
from unbraid.sampling.render import Use, own_prompt, render


def split(image: str | Path, *, subject: str, style: str, **options: Any) -> Path:
    """One image → `content.safetensors` and `style.safetensors`; returns the run folder. Options as in `job`."""
    return finish(split_job(image, subject=subject, style=style, **options))


def learn(images: str | Path | Sequence[str | Path], *, prompt: str, **options: Any) -> Path:
    """Images of one thing → `lora.safetensors`; returns the run folder. Options as in `job`."""
    return finish(learn_job(images, prompt=prompt, **options))


def pair(before: str | Path, after: str | Path, *, subject: str, style: str, **options: Any) -> Path:
    """A picture before and after → `style.safetensors` and `content.safetensors`; of two folders, the style alone. Returns the
    run folder. Options as in `pair_job`."""
    return finish(pair_job(before, after, subject=subject, style=style, **options))


def zip(content: str | Path, style: str | Path, **options: Any) -> Path:
    """LoRAs → the same LoRAs without interference, one file each, or `merged.safetensors` with `single=True`;
    returns the run folder. Options as in `zip_job`."""
    return finish(zip_job(content, style, **options))


def split_job(image: str | Path, *, subject: str, style: str, method: str = "unziplora", **options: Any) -> Job:
    return job([image], {"subject": subject, "style": style}, method=method, **options)


def learn_job(
    images: str | Path | Sequence[str | Path],
    *,
    prompt: str,
    class_prompt: str = "",
    class_images: str | Path | None = None,
    from_: str | Path | None = None,
    method: str = "dreambooth",
    **options: Any,
) -> Job:
    """Learn from images, each under `prompt`, or under a line of NAME.txt or NAME.caption beside NAME.png. With a `class_prompt`
    the prior is preserved: on `class_images`, or on pictures that the base draws of it. `from_`: a LoRA to go on from, in place of a
    fresh one: its modules, ranks and strengths (alpha, folded into the factors)."""
    words, roles = {"prompt": prompt}, {"image": [images] if isinstance(images, str | Path) else list(images)}
    if class_prompt:
        words["class_prompt"] = class_prompt
        options = {"prior_weight": 1.0, **options}
    if class_images:
        roles["prior"] = [class_images]
    if from_:
        if taken := [key for key in ("rank", "targets") if key in options]:
            raise UsageError(f"{taken[0]!r} is the LoRA's own", "--from", "Leave it out.")
        ranks = {len(lora.down) for lora in read(Path(from_)).modules.values()}
        options |= {"rank": max(ranks), "loras": {"lora": Path(from_)}}
    todo = job(roles, words, method=method, **options)
    if bool(todo.settings.get("prior_weight")) != bool(class_prompt):
        raise UsageError("prior preservation needs a prompt of the class", "--class-prompt", "For example: a dog.")
    captions = {path: "\n".join(lines) for path in todo.images["image"] if (lines := captions_of(path))}
    return replace(todo, captions=captions)


def pair_job(
    before: str | Path,
    after: str | Path,
    *,
    subject: str,
    style: str,
    beside: Sequence[str | Path] = (),
    method: str = "pair",
    **options: Any,
) -> Job:
    """Learn what a style does to a picture. Folders are paired by name; NAME.txt beside a picture before says in a word
    or two what that one shows, in place of `subject`. `beside`: other styles, which this one shall not meet."""
    couples = matched(Path(before), Path(after))
    files: dict[str, Sequence[str | Path]] = {}
    captions: dict[Path, str] = {}
    for (first, second), number in builtins.zip(couples, numbered(len(couples)), strict=True):
        files |= {f"before{number}": [first], f"after{number}": [second]}
        if shown := caption_of(first):
            captions |= {first: f"a {RARE} {shown}", second: f"a {RARE} {shown} in {style} style"}
    where = options.pop("out", None) or Path("runs") / f"{couples[0][1].stem}-{method}"
    words = {"subject": subject, "style": style}
    todo = job(files, words, method=method, out=where, pairs=len(couples), **options)
    if beside:
        if not todo.settings.get("orthogonal"):
            raise UsageError("needs orthogonal rows", "--beside", "Use --method pair with orthogonal=true.")
        others = {Path(one): read(Path(one)).modules for one in beside}
        slot = free_slot(others, todo.settings["rank"], options.get("slot"))
        todo = replace(todo, settings={**todo.settings, "slot": slot})
    return replace(todo, captions=captions, told=unused([Path(before), Path(after)]))


def zip_job(
    content: str | Path,
    style: str | Path,
    *,
    also: Sequence[str | Path] = (),
    images: Mapping[str, str | Path] | None = None,
    prompts: Mapping[str, str] | None = None,
    method: str = "ziplora",
    **options: Any,
) -> Job:
    """Zip two LoRAs, or more: roles `content`, `style`, `lora3`, … `images`: role → the pictures (a file or a folder)
    that the LoRA was trained on; without them it draws its own. `prompts`: role → the prompt that it was trained with,
    if its file does not say; `both`: what to draw for looking at."""
    files = [Path(one) for one in (content, style, *also)]
    loras = {("content", "style")[i] if i < 2 else f"lora{i + 1}": file for i, file in enumerate(files)}
    words = {role: (prompts or {}).get(role) or own_prompt(file, read(file)) for role, file in loras.items()}
    words["both"] = (prompts or {}).get("both") or ", ".join(words.values())
    found = {role: [where] for role, where in (images or {}).items()}
    where = options.pop("out", None) or Path("runs") / f"{files[0].stem}-{files[1].stem}-{method}"
    return job(found, words, method=method, out=where, loras=loras, roles=tuple(loras), **options)


def job(
    images: Sequence[str | Path] | Mapping[str, Sequence[str | Path]],
    words: dict[str, str],
    *,
    method: str,
    out: str | Path | None = None,
    base: str = "icons",
    vae: str = "",
    prediction: str = "",
    vram: str = "max",
    compile: bool = False,
    graphs: bool = True,
    device: str = "",
    seed: int = 0,
    previews: int = 3,
    config: Path | None = None,
    loras: Mapping[str, Path] | None = None,
    thumbnail: bool = True,
    metadata: bool = True,
    **settings: Any,
) -> Job:
    """A run from plain values: images by role, or a list of them. `settings` are those of the method (`unbraid explain
    METHOD`); `vae`, `prediction`, `vram`, `compile`, `graphs`, `device` those of `presets.Loading`; `thumbnail`, `metadata`: whether the LoRAs hold a
    small picture, and what they were trained with."""
    roles = images if isinstance(images, Mapping) else {"image": images}
    looked = {role: [look(Path(image)) for image in some] for role, some in roles.items()}
    files = {role: tuple(file for one in some for file in one.files) for role, some in looked.items()}
    told = dict.fromkeys(line for some in looked.values() for one in some for line in one.unused)
    where = Path(out) if out else Path("runs") / f"{next(iter(files.values()))[0].stem}-{method}"
    loading = Loading(vae, prediction, vram, compile, graphs, device)
    resolved = resolve(method, base, config, settings)
    return Job(
        method,
        files,
        words,
        where,
        resolved,
        base,
        counted("seed", seed, SEEDS),
        counted("previews", previews, PREVIEWS),
        loras or {},
        loading=loading,
        thumbnail=thumbnail,
        metadata=metadata,
        told=tuple(told),
    )


def generate(
    prompt: str,
    loras: Sequence[Use | str | Path] = (),
    *,
    base: str = "icons",
    vae: str = "",
    prediction: str = "",
    graphs: bool = True,
    device: str = "",
    **options: Any,
) -> list[Image.Image]:
    """Pictures of a prompt with LoRA files; `vae`, `prediction`, `graphs` and `device` as in `presets.Loading`, options as in `render.render`."""
    uses = [one if isinstance(one, Use) else Use(Path(one)) for one in loras]
    loading = Loading(vae, prediction, graphs=graphs, device=device)
    return render(load(base, loading=loading), prompt, uses, **options)


def progress(todo: Job, resume: bool = False) -> Iterator[Progress]:
    """The steps and files of a job as they come."""
    return run(todo, resume=resume)


def finish(todo: Job) -> Path:
    """Run a job to its end; returns its folder."""
    for event in run(todo):
        if event.undone:
            warnings.warn(event.warning, RuntimeWarning, stacklevel=3)
    return todo.out
