"""Prepare a run for its first step: encode prompts and pictures, and attach adapters."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from unbraid.bases.base import Base, Picture, RunData
from unbraid.bases.families.family import Prompt
from unbraid.bases.families.segments import with_segments
from unbraid.bases.savings import with_optimizer
from unbraid.common.errors import UnsuitedError, UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active
from unbraid.core.optim import adamw
from unbraid.core.recipe import Recipe
from unbraid.core.selectors import chosen
from unbraid.core.state import State
from unbraid.files.lora_file import read
from unbraid.images.crop import fit
from unbraid.images.opening import open_alpha
from unbraid.methods import METHODS
from unbraid.runs import pace, showcase
from unbraid.runs.job import Job, Training
from unbraid.sampling.attach import attach
from unbraid.sampling.sample import NEGATIVE, classifier_free, generate

GUIDANCE = 4.0  # guidance scale for previews, sheets, and pictures that are drawn for training
DRAWN, DRAWN_OF_CLASS = 4, 16  # pictures drawn if none are given: by a LoRA; by the base for a class


@dataclass(frozen=True)
class Ready:
    """A run that is ready for its first step."""

    job: Job
    base: Base
    run_data: RunData
    adapters: Adapters
    recipe: Recipe
    state: State
    images: Mapping[str, Sequence[Image.Image]]  # role → pictures, as opened or as drawn for the role
    matched: Mapping[str, Sequence[str]] = field(default_factory=dict)  # role → the layers that --blocks selects for it


def prepare(job: Job, texts: Mapping[str, str], opened: Mapping[str, list[Image.Image]], base: Base) -> Ready:
    """Encode prompts and pictures, draw missing ones, and attach adapters. On an error the adapters are detached."""
    (made,) = METHODS[job.method].make(job.data.training.blocks or base.family.blocks, **job.settings)
    training = job.data.training
    if job.loading.optimizer and made.optimization.optimizer is not adamw:
        raise UsageError(
            f"{job.method} has an optimiser of its own with these settings", "--optimizer", "Leave it out."
        )
    recipe = with_batch(with_schedule(with_optimizer(made, job.loading.preset), training), training)
    if not base.family.network.layers.own_prompt:
        _check_alone(recipe)
    if not base.family.network.layers.text and any(one.segment for two in recipe.branches(0) for one in two.active):
        what = f"the text of this {base.family.network.title} cannot be divided into segments"
        raise UnsuitedError(what, "setting segments", "Leave it out, or use Flux.1 or SD3.5.")
    prompts = {role: base.encode_prompt(text) for role, text in texts.items()} | {NEGATIVE: base.encode_negative()}
    started = attach(base, {role: (path, read(path).modules) for role, path in job.data.loras.items()})
    adapters = started or Adapters.attach(base.denoiser, recipe.targets, base.family.network.layers)
    adapters.alpha = training.alpha
    with ExitStack() as undo:
        undo.callback(adapters.detach)
        matched = chosen(given, adapters.layers, "--blocks") if (given := job.data.training.blocks) else {}
        captions = {role: base.encode_prompt(text) for path in job.data.captions for role, text in _captions(job, path)}
        prompts = with_segments([branch.prompt for branch in recipe.branches(0)], base.alike(prompts | captions))
        prompts |= _for_the_sheet(job, base, prompts[NEGATIVE])
        images = {**opened, **_drawn(job, base, adapters, prompts, recipe, opened.keys())}
        encoded = {
            role: [
                _picture(base, image, where, job)
                for image, where in zip(some, job.data.images.get(role) or [source(job, role)] * len(some), strict=True)
            ]
            for role, some in images.items()
        }
        state = State.fresh(adapters, recipe, torch.Generator().manual_seed(job.seed))
        if training.alpha and (others := {name for name, _ in recipe.rates} - adapters.scaled):
            what = f"the form of {' and '.join(sorted(others))} is that of the method, or of a LoRA that it starts from"
            raise UsageError(what, "--alpha", "Leave it out.")
        undo.pop_all()
    return Ready(job, base, RunData(base, encoded, prompts), adapters, recipe, state, images, matched)


def _for_the_sheet(job: Job, base: Base, like: Prompt) -> dict[str, Prompt]:
    """The prompts of the sheet's further rows, by their text; those that are as long as the others, which are not padded for them."""
    if not job.extras.previews:
        return {}
    encoded = {text: base.encode_prompt(text) for row in showcase.rows(job) for text in row.prompts.values()}
    every = base.family.network.ragged
    return {text: prompt for text, prompt in encoded.items() if every or len(prompt.embeds) == len(like.embeds)}


def _check_alone(recipe: Recipe) -> None:
    """For networks in which adapters cannot read their own prompts: UsageError if an adapter that should is never trained
    alone, under its own prompt, nor with a segment of the text."""
    branches = recipe.branches(0)
    alone = {
        one.adapter
        for branch in branches
        if len(branch.active) == 1 and (one := branch.active[0]).prompt == branch.prompt
    }
    own = {active.adapter for branch in branches for active in branch.active if active.prompt and not active.segment}
    if missing := sorted(own - alone):
        fix = "Use --method unziplora with content_alone and style_alone above 0."
        raise UsageError(f"on this base, {missing[0]} cannot read a prompt of its own", "split", fix)


def with_schedule(recipe: Recipe, training: Training) -> Recipe:
    """A recipe with the run's schedule and warm-up, if it has any, on top of the recipe's own."""
    if training.schedule == "constant" and not training.warm_up:
        return recipe
    own = recipe.optimization.rate_factor or (lambda step: 1.0)
    optimization = replace(
        recipe.optimization, rate_factor=lambda step: own(step) * training.factor(step, recipe.steps)
    )
    return replace(recipe, optimization=optimization)


def with_batch(recipe: Recipe, training: Training) -> Recipe:
    """A recipe whose steps have so many samples of each branch."""
    return replace(recipe, passes=replace(recipe.passes, batch_size=training.batch_size))


def _drawn(
    job: Job, base: Base, adapters: Adapters, prompts: Mapping[str, Prompt], recipe: Recipe, given: Collection[str]
) -> dict[str, list[Image.Image]]:
    """Draw pictures for roles without any, under the role's prompt: with the role's LoRA if there is one."""
    out = {}
    wanted = {branch.image for step in range(max(recipe.steps, 1)) for branch in recipe.branches(step)}
    for role in sorted(wanted - set(given)):
        active, count = ((Active(role),), DRAWN) if role in job.data.loras else ((), DRAWN_OF_CLASS)
        terms = classifier_free(GUIDANCE, role, active)
        seeds = range(job.seed, job.seed + count)  # one at a time: sixteen in one batch do not fit beside a large base
        out[role] = [generate(base, terms, prompts, adapters, seeds=(i,), steps=pace.SHEET_STEPS)[0] for i in seeds]
    return out


def source(job: Job, role: str) -> Path:
    """The LoRA file that drew a role's pictures, or "the base". For errors and captions."""
    return job.data.loras.get(role, Path("the base"))


def _captions(job: Job, picture: Path) -> list[tuple[str, str]]:
    """A picture's own prompts, each as (the role that names it, its text)."""
    return [(f"caption {i} {picture}", text) for i, text in enumerate(job.data.captions.get(picture, "").splitlines())]


def _picture(base: Base, image: Image.Image, where: Path, job: Job) -> Picture:
    side = job.data.training.resolution or base.size
    pixels = fit(image, side**2, base.step, where)
    picture = base.encode_picture(pixels.values, pixels.sizes)
    masked = job.settings.get("mask") == "alpha" and any(where in some for some in job.data.images.values())
    weight = opacity(where, base, picture, side) if masked else None
    return replace(picture, prompts=tuple(name for name, _ in _captions(job, where)), weight=weight)


def opacity(where: Path, base: Base, picture: Picture, side: int = 0) -> Tensor:
    """The opacity of a picture, from 0 to 1, at each position of its latent: `[1, h, w]`. `side`: see `Training.resolution`.

    UsageError if the whole picture is transparent."""
    alpha = fit(open_alpha(where).convert("RGB"), (side or base.size) ** 2, base.step, where).values[:1] / 2 + 0.5
    _, height, width = picture.mean.shape
    found = adaptive_avg_pool2d(alpha, (height, width))
    if not bool(found.any()):
        raise UsageError("is wholly transparent: nothing of it would be learnt", where, "Leave out mask=alpha.")
    return found.to(picture.mean)
