"""The verbs in Python, with the names and settings of the command line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unbraid.base import load
from unbraid.data import list_images
from unbraid.render import Use, render
from unbraid.run import Job, Progress, run
from unbraid.settings import resolve


def split(image: str | Path, *, subject: str, style: str, **options: Any) -> Path:
    """One image → `content.safetensors` and `style.safetensors`; returns the run folder. Options as in `job`."""
    return _finish(split_job(image, subject=subject, style=style, **options))


def learn(images: str | Path | Sequence[str | Path], *, prompt: str, **options: Any) -> Path:
    """Images of one thing → `lora.safetensors`; returns the run folder. Options as in `job`."""
    return _finish(learn_job(images, prompt=prompt, **options))


def split_job(image: str | Path, *, subject: str, style: str, method: str = "unziplora", **options: Any) -> Job:
    return job([image], {"subject": subject, "style": style}, method=method, **options)


def learn_job(
    images: str | Path | Sequence[str | Path], *, prompt: str, method: str = "dreambooth", **options: Any
) -> Job:
    return job([images] if isinstance(images, str | Path) else images, {"prompt": prompt}, method=method, **options)


def job(
    images: Sequence[str | Path],
    words: dict[str, str],
    *,
    method: str,
    out: str | Path | None = None,
    base: str = "icons",
    seed: int = 0,
    previews: int = 3,
    config: Path | None = None,
    **settings: Any,
) -> Job:
    """A run from plain values. `settings` are those of the method (`unbraid explain METHOD`)."""
    files = tuple(file for image in images for file in list_images(Path(image)))
    where = Path(out) if out else Path("runs") / f"{files[0].stem}-{method}"
    return Job(method, {"image": files}, words, where, resolve(method, base, config, settings), base, seed, previews)


def generate(
    prompt: str, loras: Sequence[Use | str | Path] = (), *, base: str = "icons", **options: Any
) -> list[Image.Image]:
    """Pictures of a prompt with LoRA files; options as in `render.render`."""
    uses = [one if isinstance(one, Use) else Use(Path(one)) for one in loras]
    return render(load(base), prompt, uses, **options)


def progress(todo: Job, resume: bool = False) -> Iterator[Progress]:
    """The steps and files of a job as they come."""
    return run(todo, resume=resume)


def _finish(todo: Job) -> Path:
    for _ in run(todo):
        pass
    return todo.out
