"""One run: a method on images, into one folder with run.toml, events.jsonl, previews, pictures and the LoRA files."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unbraid import folder, pictures
from unbraid.base import BLOCKS, Base, Studies, load
from unbraid.data import fit, open_image
from unbraid.errors import UsageError
from unbraid.files import write
from unbraid.formats.metadata import card
from unbraid.lora import Active, Adapters
from unbraid.methods import METHODS
from unbraid.sample import NEGATIVE, classifier_free, generate
from unbraid.settings import Settings
from unbraid.train import Recipe, State, Step, train

RARE = "sks"
SAVE_EVERY = 20.0  # seconds of work that a kill may cost
PREVIEW_STEPS, PREVIEW_GUIDANCE = 12, 4.0


@dataclass(frozen=True)
class Job:
    """What to do, fully resolved: everything that run.toml says."""

    method: str
    images: Mapping[str, tuple[Path, ...]]  # role → files
    words: Mapping[str, str]  # what fills the prompt templates
    out: Path
    settings: Settings
    base: str = "icons"
    seed: int = 0
    previews: int = 3  # preview sheets during training; 0: no pictures at all


@dataclass(frozen=True)
class Progress:
    """One thing that happened: a training step, or a file that is there now."""

    done: int
    total: int
    step: Step | None = None
    file: Path | None = None


@dataclass(frozen=True)
class _Run:
    """A run that is ready to go."""

    job: Job
    base: Base
    studies: Studies
    adapters: Adapters
    recipe: Recipe
    state: State


def prompts_of(job: Job) -> dict[str, str]:
    """Role → prompt, from the method's templates."""
    words = {"rare": RARE, **job.words}
    for name, value in words.items():
        if not value.strip():
            raise UsageError("is empty", f"--{name}", "Say in a word or two what it is.")
    return {role: template.format(**words) for role, template in METHODS[job.method].prompts.items()}


def run(job: Job, *, resume: bool = False, device: str | None = None) -> Iterator[Progress]:
    """Train `job` into its folder, yielding what happens. Killed at any moment, `resume=True` goes on from the last
    saved state and ends with the same files, bit for bit on a CPU."""
    texts = prompts_of(job)
    opened = {role: [open_image(path) for path in paths] for role, paths in job.images.items()}
    ready = _prepare(job, texts, opened, device)
    folder.claim(job.out, _record(job, texts), resume)
    if resume and (saved := folder.load_state(job.out)):
        ready.state.restore(saved)
    events = folder.Events(job.out, ready.state.step)
    yield from _train(ready, events)
    total = ready.recipe.steps
    for file in _finish(ready, texts, opened):
        yield Progress(total, total, file=file)
    (job.out / folder.STATE).unlink(missing_ok=True)


def _prepare(job: Job, texts: Mapping[str, str], opened: Mapping[str, list[Image.Image]], device: str | None) -> _Run:
    base = load(job.base, device)
    (recipe,) = METHODS[job.method].make(BLOCKS[base.family], **job.settings)
    pixels = {
        role: [fit(image, base.size**2, base.step, path) for image, path in zip(images, job.images[role], strict=True)]
        for role, images in opened.items()
    }
    encoded = {role: [base.encode_picture(one.values, one.sizes) for one in some] for role, some in pixels.items()}
    prompts = {role: base.encode_prompt(text) for role, text in texts.items()} | {NEGATIVE: base.encode_negative()}
    adapters = Adapters.attach(base.unet)
    state = State.fresh(adapters, recipe, torch.Generator().manual_seed(job.seed))
    return _Run(job, base, Studies(base, encoded, prompts), adapters, recipe, state)


def _train(ready: _Run, events: folder.Events) -> Iterator[Progress]:
    job, state, steps = ready.job, ready.state, ready.recipe.steps
    preview_at = {round(steps * (i + 1) / job.previews) for i in range(job.previews)}
    saved = time.monotonic()
    for step in train(ready.studies, ready.recipe, state):
        events.add(step=step.index, loss=step.loss, losses=step.losses, norm=step.norm)
        yield Progress(state.step, steps, step=step)
        if state.step in preview_at:
            yield Progress(state.step, steps, file=_preview(ready))
        if time.monotonic() - saved > SAVE_EVERY or state.step == steps:
            events.flush()
            folder.save_state(job.out, state.tensors())
            saved = time.monotonic()


def _preview(ready: _Run) -> Path:
    """One picture per use, at the same seed every time."""
    cells = [(name, images[0]) for name, images in _uses(ready, (0,), PREVIEW_STEPS)]
    sheet = pictures.contact_sheet([(f"step {ready.state.step}", cells)])
    return pictures.save_image(sheet, ready.job.out / "previews" / f"step_{ready.state.step:06d}.png")


def _uses(ready: _Run, seeds: tuple[int, ...], steps: int) -> Iterator[tuple[str, list[Image.Image]]]:
    """The base alone, each LoRA alone under its own prompt, and all together."""
    outputs = METHODS[ready.job.method].outputs(ready.job.settings).values()
    roles = {output.adapter: output.prompt for output in outputs}
    uses: dict[str, tuple[str, tuple[Active, ...]]] = {"base alone": ("both", ())}
    uses |= {f"{adapter} alone": (role, (Active(adapter),)) for adapter, role in roles.items()}
    if len(roles) > 1:
        uses["together"] = ("both", tuple(Active(adapter, prompt=role) for adapter, role in roles.items()))
    for name, (role, active) in uses.items():
        terms = classifier_free(PREVIEW_GUIDANCE, role, active)
        yield name, generate(ready.base, terms, ready.studies.encoded, ready.adapters, seeds=seeds, steps=steps)


def _finish(ready: _Run, texts: Mapping[str, str], opened: Mapping[str, list[Image.Image]]) -> Iterator[Path]:
    job = ready.job
    for stem, output in METHODS[job.method].outputs(job.settings).items():
        folded = ready.adapters.folded(output.adapter, output.gates)
        modules = {f"unet.{name}": lora for name, lora in folded.items()}
        path = job.out / f"{stem}.safetensors"
        write(path, modules, family=ready.base.family, metadata=_metadata(ready, stem, texts[output.prompt], texts))
        yield path
    losses = [event["loss"] for event in folder.read_events(job.out)]
    yield pictures.loss_plot(losses, job.out / "loss.png")
    if job.previews:
        yield _sheet(ready, texts, opened)


def _sheet(ready: _Run, texts: Mapping[str, str], opened: Mapping[str, list[Image.Image]]) -> Path:
    """The input, and every use at four seeds."""
    job = ready.job
    rows = [
        (
            "input: " + texts["both"],
            [(path.name, image) for path, image in zip(job.images["image"], opened["image"], strict=True)],
        )
    ]
    rows += [
        (name, [(f"seed {i}", image) for i, image in enumerate(images)])
        for name, images in _uses(ready, (0, 1, 2, 3), 25)
    ]
    return pictures.save_image(pictures.contact_sheet(rows), job.out / "sheet.png")


def _record(job: Job, texts: Mapping[str, str]) -> dict[str, Any]:
    """run.toml. Its method table can be given back as --config."""
    images = {role: [str(path) for path in paths] for role, paths in job.images.items()}
    hashes = {role: [folder.sha256(path) for path in paths] for role, paths in job.images.items()}
    return {
        "unbraid": version("unbraid"),
        "method": job.method,
        "base": job.base,
        "seed": job.seed,
        "previews": job.previews,
        "words": dict(job.words),
        "images": images,
        "sha256": hashes,
        "prompts": dict(texts),
        job.method: dict(job.settings),
    }


def _metadata(ready: _Run, stem: str, prompt: str, texts: Mapping[str, str]) -> dict[str, str]:
    """What the file says of itself, in the keys that other tools read (ss_*, ModelSpec) and our own."""
    job, (source, *_) = ready.job, next(iter(ready.job.images.values()))
    return {
        **card(f"{stem} of {texts['both']}", prompt, stem.capitalize(), thumbnail=source),
        "modelspec.date": datetime.now(UTC).date().isoformat(),
        "ss_output_name": stem,
        "ss_sd_model_name": job.base,
        "ss_seed": str(job.seed),
        "ss_steps": str(ready.recipe.steps),
        "unbraid.method": job.method,
        "unbraid.prompt": prompt,
        "unbraid.base": job.base,
        "unbraid.settings": json.dumps(job.settings),
    }
