"""One run: train a method on images, into a folder with run.toml, events.jsonl, previews, pictures and LoRA files."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from unbraid.bases.base import Base, load
from unbraid.bases.devices import memory_in_use
from unbraid.bases.savings import drop_foreign_moments, memory_error, notes
from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError, first_line
from unbraid.core import mergers
from unbraid.core.lora import Branch
from unbraid.core.recipe import ForwardRequest, TrainingCoroutine, go_on
from unbraid.core.selectors import groups_of
from unbraid.core.train import precomputed_targets, run_one, training_coroutine
from unbraid.images import sheets
from unbraid.images.opening import moves
from unbraid.methods import METHODS
from unbraid.runs import folder, job_folder, pace
from unbraid.runs.job import Job, Progress, finished, opened_images, prompts_of, record
from unbraid.runs.outputs import drawings, preview, written
from unbraid.runs.prepare import Ready, prepare

BLOCKS = "blocks.txt"  # the layers that --blocks selects, one a line
NOTHING = "this run is done already: nothing is trained"
UNCAPTURED = "steps run one kernel at a time, several times slower: no CUDA graph could be captured"
UNDONE = (
    UsageError,
    OSError,
    ValueError,
    RuntimeError,
    MemoryError,
)  # errors that drawing can raise; torch.OutOfMemoryError is a RuntimeError


def run(job: Job, *, resume: bool = False, device: str | None = None) -> Iterator[Progress]:
    """Train `job` into its folder, and yield its progress.

    A run may be killed at any moment. With `resume=True` it continues from the last saved state, and ends with the same
    files, on a CPU bit for bit."""
    try:
        at_once = job.loading.preset.at_once
        yield from run_one(script(job, resume, lambda job: load(job.base, device, job.loading)), at_once)
    except torch.OutOfMemoryError as error:
        raise memory_error(job.loading.preset, folder.begun(job.out)) from error


def script(job: Job, resume: bool, find: Callable[[Job], Base]) -> TrainingCoroutine[Progress]:
    """`run` as a coroutine that leaves the forward passes of its steps to the caller.

    The caller answers each `ForwardRequest`, with the run's adapters in the model. `find` gives the job's base, without
    any adapters; at the end it has none again."""
    texts, opened = prompts_of(job), opened_images(job)
    recorded = record(job, texts)
    resume = folder.goes_on(job.out, resume)
    folder.claimable(job.out, recorded, resume)
    if resume and finished(job):
        with folder.locked(job.out):  # deletes the partly written files of a run that was killed
            _mark_done(job)
        yield Progress(1, 1, warning=NOTHING)
        return
    warnings = [*job.notes, *remarks(job), *METHODS[job.method].inputs.check(opened, job.data.images)]
    ready = prepare(job, texts, opened, find(job))
    try:
        warnings += ready.base.family.network.remarks(
            ready.base.pipe, [*texts.values(), *"\n".join(job.data.captions.values()).splitlines()]
        )
        ready.base.release(tiles=job.loading.preset.fp8)
        warnings += notes(ready.base.device, job.loading)
        with folder.locked(job.out) as check:
            resume = folder.goes_on(job.out, resume)  # another worker may have been here while the base was loaded
            folder.claim(job.out, recorded, resume)
            if resume and finished(job):
                yield Progress(1, 1, warning=NOTHING)
            else:
                yield from _matched(ready)
                for warning in warnings:
                    yield Progress(0, ready.recipe.steps, warning=warning)
                yield from _while_held(_train_and_write(ready, texts, resume), check)
            _mark_done(job)
    finally:
        ready.adapters.detach()


def _while_held(training: TrainingCoroutine[Progress], check: Callable[[], None]) -> TrainingCoroutine[Progress]:
    """The same coroutine. After every pause, and so before anything is written, it stops if the folder's lease was lost."""
    try:
        item = next(training, None)
        while item is not None:
            answer = yield item
            check()
            item = go_on(training, answer)
    finally:
        training.close()


def _mark_done(job: Job) -> None:
    if folder.is_job(job.out):
        job_folder.mark_done(job.out)


def _matched(ready: Ready) -> Iterator[Progress]:
    """Record which layers `--blocks` selects, in `blocks.txt`, and say how many."""
    if ready.matched:
        lines = [f"{role} {layer}\n" for role, layers in ready.matched.items() for layer in layers]
        with atomic(ready.job.out / BLOCKS) as part:
            part.write_text("".join(lines), "utf-8")
    for role, layers in ready.matched.items():
        note = f"{role}: {len(layers)} layers, {', '.join(groups_of(layers))} (all in {BLOCKS})"
        yield Progress(0, ready.recipe.steps, note=note)


def _train_and_write(ready: Ready, texts: Mapping[str, str], resume: bool) -> TrainingCoroutine[Progress]:
    job, total = ready.job, ready.recipe.steps
    for role in ready.images.keys() - job.data.images.keys():
        for i, image in enumerate(ready.images[role]):
            path = job.out / "drawn" / f"{role}_{i}.png"
            if (event := _picture(ready, path.name, partial(sheets.save_image, image, path))).undone:
                yield event
    begin = ready.state.rng.clone_state()
    if resume and (saved := folder.load_state(job.out)):
        kept, notices = drop_foreign_moments(saved, job.loading.preset)
        ready.state.restore(kept)
        if ready.state.step > total:
            fix = f"Delete {folder.STATE} to start this run from its beginning."
            raise UsageError(f"the saved state is of step {ready.state.step}, of {total}", job.out, fix)
        for warning in notices:
            yield Progress(ready.state.step, ready.recipe.steps, warning=warning)
    events = folder.Events(job.out, ready.state.step)
    yield from _train(ready, texts, events, begin)
    if mergers.collapsed(mergers.summary(ready.adapters)):
        warning = "the coefficients collapsed: all LoRAs were weakened alike. Lower lr or weight, or use similarity=cos"
        yield Progress(total, total, warning=warning)
    for file in written(ready, texts):
        yield Progress(total, total, file=file)
    for name, draw in drawings(ready, texts).items():
        yield _picture(ready, name, draw)
    (job.out / folder.STATE).unlink(missing_ok=True)


def _picture(ready: Ready, name: str, make: Callable[[], Path]) -> Progress:
    """Make a picture to look at. A failure gives a warning, not an error, so that no training is lost because of it."""
    done, total = ready.state.step, ready.recipe.steps
    try:
        return Progress(done, total, file=make())
    except UNDONE as error:
        return Progress(done, total, warning=f"{name} could not be made: {first_line(error)}", undone=True)


def remarks(job: Job) -> list[str]:
    """Warnings about the pictures: a file that holds several is used for its first one only."""
    files = dict.fromkeys(path for paths in job.data.images.values() for path in paths)
    return [f"{path} holds several pictures; the first one is used" for path in files if moves(path)]


def _train(
    ready: Ready, texts: Mapping[str, str], events: folder.Events, begin: torch.Generator
) -> TrainingCoroutine[Progress]:
    job, state, steps = ready.job, ready.state, ready.recipe.steps
    targets = None
    if ready.recipe.passes.fixed_teachers:
        at_once = max(4, 2 * job.loading.preset.at_once)
        targets = precomputed_targets(ready.run_data, ready.recipe, state.adapters, begin, state.step, at_once)
    preview_at = {round(steps * (i + 1) / job.extras.previews) for i in range(job.extras.previews)}
    saved = before = time.monotonic()
    training = training_coroutine(ready.run_data, ready.recipe, state, targets)
    item = next(training, None)
    while item:
        if isinstance(item, ForwardRequest):
            item = go_on(training, (yield item))
            continue
        loss, norm, losses = item.figures[0], item.figures[1], item.figures[2:]
        if (graphs := ready.run_data.graphs) and graphs.reason:
            yield Progress(state.step, steps, warning=f"{UNCAPTURED}: {graphs.reason}")
            ready.run_data.graphs = None
        named = dict(zip(_names(ready.recipe.branches(item.index)), losses, strict=True))
        now = time.monotonic()
        cost = {"time": round(time.time(), 3), "rate": round(1 / max(now - before, 1e-6), 3)}
        cost["memory"] = memory_in_use(ready.base.device)
        events.add(step=item.index, loss=loss, losses=named, norm=norm, **mergers.summary(ready.adapters), **cost)
        before = now
        yield Progress(state.step, steps, step=item)
        if state.step in preview_at:
            yield _picture(ready, f"the preview of step {state.step}", partial(preview, ready))
        if time.monotonic() - saved > pace.SAVE_EVERY or state.step == steps:
            events.flush()
            folder.save_state(job.out, state.tensors())
            saved = time.monotonic()
        if state.step < steps and (job.out / folder.STOP).exists():
            yield from _stopped(ready, texts, events)
        item = go_on(training, [])


def _stopped(ready: Ready, texts: Mapping[str, str], events: folder.Events) -> Iterator[Progress]:
    """Save the state, write the LoRAs as they are now, and end the run with a UsageError that says so."""
    out, done, total = ready.job.out, ready.state.step, ready.recipe.steps
    events.flush()
    folder.save_state(out, ready.state.tensors())
    for file in written(ready, texts):
        yield Progress(done, total, file=file)
    (out / folder.STOP).unlink(missing_ok=True)
    what = f"stopped as asked, after step {done} of {total}; its LoRAs so far are there"
    raise UsageError(what, out, "Go on with --resume.")


def _names(branches: Sequence[Branch]) -> list[str]:
    """A name for the loss of each branch: its picture's role, with its prompt's where that differs; numbered if it comes twice."""
    names = [one.image if one.image == one.prompt else f"{one.image} under {one.prompt}" for one in branches]
    return [name if names.index(name) == i else f"{name} {i + 1}" for i, name in enumerate(names)]
