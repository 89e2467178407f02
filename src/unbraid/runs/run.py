"""One run: a method on images, into one folder with run.toml, events.jsonl, previews, pictures and the LoRA files."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from unbraid.bases.base import Base, Picture, Studies, load
from unbraid.bases.families.family import Prompt
from unbraid.bases.long_prompts import remarks as long_prompts
from unbraid.bases.savings import fitting, memory_error, notes, spared
from unbraid.common.errors import UsageError
from unbraid.core import mergers
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Lora
from unbraid.core.recipe import Ask, Recipe, Script, go_on
from unbraid.core.train import State, alone, course, lessons
from unbraid.files.lora_file import read, write
from unbraid.files.merge import merge
from unbraid.images import sheets as pictures
from unbraid.images.crop import fit
from unbraid.images.opening import moves, open_alpha
from unbraid.methods import METHODS
from unbraid.methods.entry import Output
from unbraid.runs import folder
from unbraid.runs.job import Job, Progress, finished, metadata, opened_images, prompts_of, record
from unbraid.runs.merger_plot import mergers_plot
from unbraid.sampling.render import attach
from unbraid.sampling.sample import NEGATIVE, classifier_free, generate

SAVE_EVERY = 20.0  # seconds of work that a kill may cost
PREVIEW_STEPS, SHEET_STEPS, GUIDANCE = 12, 25, 4.0
DRAWN, DRAWN_OF_CLASS = 4, 16  # pictures that a LoRA, or for its class the base, draws where none are given
UNCAPTURED = "steps run one kernel at a time, several times slower: no CUDA graph could be captured"
SHOWN = 8  # inputs in a row of the sheet
UNDONE = (
    UsageError,
    OSError,
    ValueError,
    RuntimeError,
    MemoryError,
)  # what drawing can fail with; torch's out of memory, too


@dataclass(frozen=True)
class Ready:
    """A run that is ready to go."""

    job: Job
    base: Base
    studies: Studies
    adapters: Adapters
    recipe: Recipe
    state: State
    images: Mapping[str, Sequence[Image.Image]]  # role → as opened, or as drawn by its LoRA


def run(job: Job, *, resume: bool = False, device: str | None = None) -> Iterator[Progress]:
    """Train `job` into its folder, yielding what happens. Killed at any moment, `resume=True` goes on from the last
    saved state and ends with the same files, bit for bit on a CPU."""
    try:
        at_once = job.loading.preset.at_once
        yield from alone(script(job, resume, lambda job: load(job.base, device, job.loading)), at_once)
    except torch.OutOfMemoryError as error:
        raise memory_error(job.loading.preset, (job.out / folder.RECORD).exists()) from error


def script(job: Job, resume: bool, find: Callable[[Job], Base]) -> Script[Progress]:
    """`run`, but for the passes of its steps: whoever runs it answers each `Ask`, with the run's adapters in the model. `find`: the
    job's base, with nothing in its model; at the end it is so again."""
    texts, opened = prompts_of(job), opened_images(job)
    said = record(job, texts)
    folder.claimable(job.out, said, resume)
    if resume and finished(job):
        with folder.locked(job.out):  # what a kill has left there goes
            pass
        yield Progress(1, 1, warning="this run is done already: nothing is trained")
        return
    warnings = [*job.told, *remarks(job), *METHODS[job.method].inputs.check(opened, job.images)]
    ready = prepare(job, texts, opened, find(job))
    try:
        warnings += long_prompts(ready.base.pipe, [*texts.values(), *"\n".join(job.captions.values()).splitlines()])
        ready.base.release(tiles=job.loading.preset.fp8)
        warnings += notes(ready.base.device, job.loading.preset)
        with folder.locked(job.out):
            folder.claim(job.out, said, resume)
            for warning in warnings:
                yield Progress(0, ready.recipe.steps, warning=warning)
            yield from _conduct(ready, texts, resume)
    finally:
        ready.adapters.detach()


def _conduct(ready: Ready, texts: Mapping[str, str], resume: bool) -> Script[Progress]:
    job, total = ready.job, ready.recipe.steps
    for role in ready.images.keys() - job.images.keys():
        for i, image in enumerate(ready.images[role]):
            path = job.out / "drawn" / f"{role}_{i}.png"
            if (event := _errand(ready, path.name, partial(pictures.save_image, image, path))).undone:
                yield event
    begin = ready.state.rng.clone_state()
    if resume and (saved := folder.load_state(job.out)):
        kept, told = fitting(saved, job.loading.preset)
        ready.state.restore(kept)
        if ready.state.step > total:
            fix = f"Delete {folder.STATE} to start this run from its beginning."
            raise UsageError(f"the saved state is of step {ready.state.step}, of {total}", job.out, fix)
        for warning in told:
            yield Progress(ready.state.step, ready.recipe.steps, warning=warning)
    events = folder.Events(job.out, ready.state.step)
    yield from _train(ready, events, begin)
    if mergers.collapsed(mergers.summary(ready.adapters)):
        warning = "the coefficients collapsed: all LoRAs were weakened alike. Lower lr or weight, or use similarity=cos"
        yield Progress(total, total, warning=warning)
    for file in _written(ready, texts):
        yield Progress(total, total, file=file)
    for name, draw in _drawings(ready, texts).items():
        yield _errand(ready, name, draw)
    (job.out / folder.STATE).unlink(missing_ok=True)


def _errand(ready: Ready, name: str, make: Callable[[], Path]) -> Progress:
    """Make a picture for people. If that fails, it is said: nothing that is trained may be lost to it."""
    done, total = ready.state.step, ready.recipe.steps
    try:
        return Progress(done, total, file=make())
    except UNDONE as error:
        reason = error.what if isinstance(error, UsageError) else str(error)
        return Progress(done, total, warning=f"{name} could not be made: {' '.join(reason.split())[:200]}", undone=True)


def remarks(job: Job) -> list[str]:
    """What is to be said of the pictures."""
    files = dict.fromkeys(path for paths in job.images.values() for path in paths)
    return [f"{path} holds several pictures; the first one is used" for path in files if moves(path)]


def prepare(job: Job, texts: Mapping[str, str], opened: Mapping[str, list[Image.Image]], base: Base) -> Ready:
    """Encode, attach: everything before the first step."""
    (made,) = METHODS[job.method].make(base.family.blocks, **job.settings)
    recipe = spared(made, job.loading.preset)
    prompts = {role: base.encode_prompt(text) for role, text in texts.items()} | {NEGATIVE: base.encode_negative()}
    started = attach(base, {role: (path, read(path).modules) for role, path in job.loras.items()})
    adapters = started or Adapters.attach(base.denoiser, recipe.targets)
    with ExitStack() as undo:
        undo.callback(adapters.detach)
        captions = {role: base.encode_prompt(text) for path in job.captions for role, text in _captions(job, path)}
        prompts = base.alike(prompts | captions)
        images = {**opened, **_drawn(job, base, adapters, prompts, recipe, opened.keys())}
        encoded = {
            role: [
                _picture(base, image, where, job)
                for image, where in zip(some, job.images.get(role) or [_source(job, role)] * len(some), strict=True)
            ]
            for role, some in images.items()
        }
        state = State.fresh(adapters, recipe, torch.Generator().manual_seed(job.seed))
        undo.pop_all()
    return Ready(job, base, Studies(base, encoded, prompts), adapters, recipe, state, images)


def _drawn(
    job: Job, base: Base, adapters: Adapters, prompts: Mapping[str, Prompt], recipe: Recipe, given: Collection[str]
) -> dict[str, list[Image.Image]]:
    """Pictures for the roles that come without any: drawn under the role's prompt by its LoRA, or by the base alone."""
    out = {}
    for role in sorted({branch.image for branch in recipe.branches(0)} - set(given)):
        active, count = ((Active(role),), DRAWN) if role in job.loras else ((), DRAWN_OF_CLASS)
        terms = classifier_free(GUIDANCE, role, active)
        seeds = range(job.seed, job.seed + count)  # one by one: sixteen at once do not fit beside a large base
        out[role] = [generate(base, terms, prompts, adapters, seeds=(i,), steps=SHEET_STEPS)[0] for i in seeds]
    return out


def _source(job: Job, role: str) -> Path:
    """Who drew a role's pictures, for errors and captions."""
    return job.loras.get(role, Path("the base"))


def _captions(job: Job, picture: Path) -> list[tuple[str, str]]:
    """The role and the text of each of a picture's own prompts."""
    return [(f"caption {i} {picture}", text) for i, text in enumerate(job.captions.get(picture, "").splitlines())]


def _picture(base: Base, image: Image.Image, where: Path, job: Job) -> Picture:
    pixels = fit(image, base.size**2, base.step, where)
    picture = base.encode_picture(pixels.values, pixels.sizes)
    masked = job.settings.get("mask") == "alpha" and any(where in some for some in job.images.values())
    weight = opacity(where, base, picture) if masked else None
    return replace(picture, prompts=tuple(name for name, _ in _captions(job, where)), weight=weight)


def opacity(where: Path, base: Base, picture: Picture) -> Tensor:
    """How opaque a picture is at each place of its latent, `[1, h, w]`, 0 to 1. UsageError for one that is wholly transparent."""
    alpha = fit(open_alpha(where).convert("RGB"), base.size**2, base.step, where).values[:1] / 2 + 0.5
    _, height, width = picture.mean.shape
    found = adaptive_avg_pool2d(alpha, (height, width))
    if not bool(found.any()):
        raise UsageError("is wholly transparent: nothing of it would be learnt", where, "Leave out mask=alpha.")
    return found.to(picture.mean)


def _train(ready: Ready, events: folder.Events, begin: torch.Generator) -> Script[Progress]:
    job, state, steps = ready.job, ready.state, ready.recipe.steps
    taught = None
    if ready.recipe.fixed_teachers:
        at_once = max(4, 2 * job.loading.preset.at_once)
        taught = lessons(ready.studies, ready.recipe, state.adapters, begin, state.step, at_once)
    preview_at = {round(steps * (i + 1) / job.previews) for i in range(job.previews)}
    saved, training = time.monotonic(), course(ready.studies, ready.recipe, state, taught)
    said = next(training, None)
    while said:
        if isinstance(said, Ask):
            said = go_on(training, (yield said))
            continue
        loss, norm, losses = said.figures[0], said.figures[1], said.figures[2:]
        if (graphs := ready.studies.graphs) and graphs.reason:
            yield Progress(state.step, steps, warning=f"{UNCAPTURED}: {graphs.reason}")
            ready.studies.graphs = None
        events.add(step=said.index, loss=loss, losses=losses, norm=norm, **mergers.summary(ready.adapters))
        yield Progress(state.step, steps, step=said)
        if state.step in preview_at:
            yield _errand(ready, f"the preview of step {state.step}", partial(_preview, ready))
        if time.monotonic() - saved > SAVE_EVERY or state.step == steps:
            events.flush()
            folder.save_state(job.out, state.tensors())
            saved = time.monotonic()
        said = go_on(training, [])


def _preview(ready: Ready) -> Path:
    """One picture per use, at the same seed every time."""
    cells = [(name, images[0]) for name, images in _uses(ready, (0,), PREVIEW_STEPS)]
    sheet = pictures.contact_sheet([(f"step {ready.state.step}", cells)])
    return pictures.save_image(sheet, ready.job.out / "previews" / f"step_{ready.state.step:06d}.png")


def _uses(ready: Ready, seeds: tuple[int, ...], steps: int) -> Iterator[tuple[str, list[Image.Image]]]:
    """The base alone, each LoRA alone under its own prompt, and all together."""
    if (graphs := ready.studies.graphs) and (ready.state.step == ready.recipe.steps or ready.base.short_of_memory()):
        graphs.clear()
    outputs = METHODS[ready.job.method].outputs(ready.job.settings).values()
    texts = ready.studies.encoded
    roles = {name: name if name in texts else output.prompt for output in outputs for name in output.adapters}
    own = {active.adapter for branch in ready.recipe.branches(0) for active in branch.active if active.prompt}
    uses: dict[str, tuple[str, tuple[Active, ...]]] = {"base alone": ("both", ())}
    uses |= {f"{adapter} alone": (role, (Active(adapter),)) for adapter, role in roles.items()}
    if len(roles) > 1:
        uses["together"] = (
            "both",
            tuple(Active(name, prompt=role if name in own else None) for name, role in roles.items()),
        )
    for name, (role, active) in uses.items():
        terms = classifier_free(GUIDANCE, role, active)
        some = [seeds] if ready.job.loading.preset.at_once > 1 else [(seed,) for seed in seeds]
        made = [generate(ready.base, terms, texts, ready.adapters, seeds=now, steps=steps) for now in some]
        yield name, [image for images in made for image in images]


def _written(ready: Ready, texts: Mapping[str, str]) -> Iterator[Path]:
    """The LoRAs."""
    job = ready.job
    shown = next((ready.images[role][0] for role in job.images), None)
    for stem, output in METHODS[job.method].outputs(job.settings).items():
        modules = {
            f"{ready.base.family.network.part}.{name}": lora for name, lora in _folded(ready.adapters, output).items()
        }
        path = job.out / f"{stem}.safetensors"
        write(
            path,
            modules,
            family=ready.base.family.name,
            metadata={
                **metadata(job, ready.recipe.steps, stem, texts[output.prompt], texts, shown),
                **ready.base.lora_metadata,
            },
        )
        yield path


def _drawings(ready: Ready, texts: Mapping[str, str]) -> dict[str, Callable[[], Path]]:
    """What is drawn once the LoRAs are there, by name."""
    job, out = ready.job, dict[str, Callable[[], Path]]()
    if events := folder.read_events(job.out):
        losses = [event["loss"] for event in events]
        out["loss.png"] = lambda: pictures.loss_plot(losses, job.out / "loss.png")
    part = ready.base.family.network.part
    found = {
        name: {f"{part}.{layer}": value for layer, value in mergers.values(ready.adapters, name).items()}
        for name in ready.adapters.names
    }
    if job.loras and any(found.values()):
        out["coefficients.png"] = lambda: mergers_plot(events, found, job.out / "coefficients.png")
    if job.previews:
        out["sheet.png"] = lambda: _sheet(ready, texts)
    return out


def _folded(adapters: Adapters, output: Output) -> dict[str, Lora]:
    """An output's change as plain factors; of several adapters, their exact sum."""
    parts = [adapters.folded(name, output.gates) for name in output.adapters]
    return parts[0] if len(parts) == 1 else {one.name: one.lora for one in merge(parts, [1.0] * len(parts))}


def _sheet(ready: Ready, texts: Mapping[str, str]) -> Path:
    """The inputs, and every use at four seeds."""
    job = ready.job
    said = {branch.image: texts[branch.prompt] for branch in ready.recipe.branches(max(ready.recipe.steps - 1, 0))}
    captioned = {role for role, files in job.images.items() if all(file in job.captions for file in files)}
    rows = [
        (
            "input, under its own prompt" if role in captioned else f"input: {said.get(role, role)}",
            list(zip(_labels(job, role, some), some, strict=False))[:SHOWN],
        )
        for role, some in ready.images.items()
    ]
    rows += [
        (name, [(f"seed {i}", image) for i, image in enumerate(images)])
        for name, images in _uses(ready, (0, 1, 2, 3), SHEET_STEPS)
    ]
    return pictures.save_image(pictures.contact_sheet(rows), job.out / "sheet.png")


def _labels(job: Job, role: str, images: Sequence[Image.Image]) -> list[str]:
    """What stands under each picture: its own prompt, else its file, else which LoRA drew it."""
    return [job.captions.get(path, path.name) for path in job.images.get(role, ())] or [
        f"drawn by {_source(job, role).name}"
    ] * len(images)
