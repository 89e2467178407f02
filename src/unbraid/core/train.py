"""The trainer: a recipe defines every step; `train` runs the steps and yields them.

It does not print, save or plot. The caller looks at each `Step`, and gets what to save from `State`.
`training_coroutine` does the same without running the passes through the model: it yields requests for them, so that
several jobs can share their passes (core/many.py).
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from unbraid.core.adapters import Adapters
from unbraid.core.lora import Branch
from unbraid.core.passes import answer, chunks, teacher_predictions
from unbraid.core.recipe import Denoiser, ForwardRequest, Recipe, Sample, Stop, TrainingCoroutine, go_on
from unbraid.core.state import State, Step

T = TypeVar("T")


def train(
    model: Denoiser,
    recipe: Recipe,
    state: State,
    at_once: int = 1,
    precomputed_targets: Sequence[Sequence[Sample]] | None = None,
) -> Iterator[Step]:
    """Run `recipe` from `state.step` to its end, one optimiser step per item. `at_once` branches share a forward
    pass (equal shapes only); this changes memory and speed, not the result. `precomputed_targets`: the samples from
    the function of that name."""
    return run_one(training_coroutine(model, recipe, state, precomputed_targets), at_once)


def training_coroutine(
    model: Denoiser, recipe: Recipe, state: State, precomputed_targets: Sequence[Sequence[Sample]] | None = None
) -> TrainingCoroutine[Step]:
    """Like `train`, without the passes: the caller must answer each `ForwardRequest` with its losses."""
    while state.step < recipe.steps:
        step = yield from _step(model, recipe, state, precomputed_targets)
        if recipe.stop and state.step % recipe.stop.every == 0:
            goes_on = yield from _goes_on(model, recipe, recipe.stop, state)
            if not goes_on:
                state.step = recipe.steps
        if state.step == recipe.steps:
            state.take_best()
        yield step


def run_one(coroutine: TrainingCoroutine[T], at_once: int) -> Iterator[T]:
    """Run one training coroutine: answer its requests, and yield everything else that it yields."""
    item = next(coroutine, None)
    while item is not None:
        if isinstance(item, ForwardRequest):
            item = go_on(coroutine, answer(item, at_once))
        else:
            yield item
            item = go_on(coroutine, [])


def precomputed_targets(
    model: Denoiser, recipe: Recipe, adapters: Adapters, rng: torch.Generator, begin: int = 0, at_once: int = 8
) -> list[list[Sample]]:
    """The samples of all steps, drawn as a run would draw them. The target of each is the prediction of its teacher, if
    it has one. Only for recipes with `fixed_teachers`.

    Teachers are evaluated in batches of `at_once`. A resumed run skips those of the steps before `begin`."""
    plan = [recipe.examples(i) for i in range(recipe.steps)]
    drawn = [draw(model, recipe, examples, rng) for examples in plan]
    wanted = [(i, j) for i, branches in enumerate(plan) for j, one in enumerate(branches) if i >= begin and one.teacher]
    for chunk in chunks([drawn[i][j] for i, j in wanted], at_once):
        places = [wanted[k] for k in chunk]
        teachers = [teacher for i, j in places if (teacher := plan[i][j].teacher)]
        predictions = teacher_predictions(model, adapters, teachers, [drawn[i][j] for i, j in places])
        for (i, j), target in zip(places, predictions.split(1), strict=True):
            drawn[i][j] = replace(drawn[i][j], target=target.to(drawn[i][j].target.dtype), taught=True)
    return drawn


def draw(model: Denoiser, recipe: Recipe, examples: Sequence[Branch], rng: torch.Generator) -> list[Sample]:
    """The samples of one step. What the branches share, they share within each example of the batch."""
    size = recipe.passes.batch_size
    drawn = []
    for i in range(size):
        some = examples[i::size]
        drawn.append(model.draw([one.image for one in some], recipe.passes.shared, rng, [one.noise for one in some]))
    return [sample for branch in zip(*drawn, strict=True) for sample in branch]


def _step(
    model: Denoiser, recipe: Recipe, state: State, precomputed_targets: Sequence[Sequence[Sample]] | None
) -> Generator[ForwardRequest, list[Tensor], Step]:
    adapters, index, hooks = state.adapters, state.step, recipe.hooks
    examples = recipe.examples(index)
    samples = precomputed_targets[index] if precomputed_targets else draw(model, recipe, examples, state.rng)
    losses: list[Tensor] = []
    _scale_rates(state.optimizer, recipe.optimization.rate_factor, index)
    size = recipe.passes.batch_size if recipe.passes.in_turn else max(len(examples), 1)
    for i in range(0, len(examples), size):
        losses += yield ForwardRequest(model, adapters, examples[i : i + size], samples[i : i + size])
        if i + size < len(examples):
            _clip(state.optimizer, recipe.optimization.clip)
            state.optimizer.step()
            state.optimizer.zero_grad()
    total = sum(one.weight * loss for one, loss in zip(examples, losses, strict=True))
    if (size := recipe.passes.batch_size) > 1:
        losses = [torch.stack(losses[i : i + size]).mean() for i in range(0, len(losses), size)]
    penalty = hooks.penalty(adapters, index) if hooks.penalty else None
    if penalty is not None:
        penalty.backward()
        total = total + penalty.detach()
    if hooks.after_backward:
        hooks.after_backward(adapters, index)
    norm = _clip(state.optimizer, recipe.optimization.clip)
    assert isinstance(total, Tensor)
    done = Step(index, torch.stack([total, norm.to(total), *losses]))
    state.record(done)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    if hooks.after_step and hooks.after_step(adapters, index):
        state.step = recipe.steps
    if state.step == recipe.steps:
        state.raise_if_not_finite()
    return done


def _goes_on(
    model: Denoiser, recipe: Recipe, stop: Stop, state: State
) -> Generator[ForwardRequest, list[Tensor], bool]:
    """Compute the validation loss of early stopping, on the same samples every time. Returns whether to continue."""
    rng = torch.Generator().manual_seed(0)
    branches = [branch for branch in stop.branches for _ in range(stop.samples)]
    samples = [model.draw([one.image], recipe.passes.shared, rng, [one.noise])[0] for one in branches]
    losses = yield ForwardRequest(model, state.adapters, branches, samples, learns=False)
    return state.record_validation(float(torch.stack(losses).mean()), stop.patience)


def _scale_rates(optimizer: torch.optim.Optimizer, factor: Callable[[int], float] | None, step: int) -> None:
    """Set the learning rates of this step. They depend on the step alone, so a resumed run has the same ones."""
    for group in optimizer.param_groups if factor else ():
        assert factor
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor(step)


def _clip(optimizer: torch.optim.Optimizer, largest: float | None) -> Tensor:
    """Scale all gradients down so that their norm is at most `largest`. Returns the norm before. This is torch's
    clip_grad_norm_ without its grouping of tensors by device, which takes time at every step."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if largest is not None:
        torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
