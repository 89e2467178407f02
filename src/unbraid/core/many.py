"""Many jobs on one frozen base: each job is independent, but they share the passes through the model.

A job is a generator that yields a `ForwardRequest` when it needs a pass (`train.training_coroutine`, or a whole run).
It runs up to its next request with its own adapters in the model. Then the requests of all jobs are answered by one
batch, in which every row uses the adapters of its own job. So each job keeps its own random numbers, optimiser, state,
penalty, hooks and clipping, and its result is the same as if it had run alone, up to rounding.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Generic, TypeVar

import psutil
import torch
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch
from unbraid.core.passes import answer
from unbraid.core.recipe import Denoiser, ForwardRequest, Recipe, TrainingCoroutine, go_on
from unbraid.core.state import State, Step
from unbraid.core.train import training_coroutine

T = TypeVar("T")
# MOST: jobs at once; more gain little (docs/batch.md). SHARE: of the free memory, which the jobs may use.
MOST, SHARE = 8, 0.5
Join = Callable[[Mapping[str, Denoiser]], Denoiser]  # job → model, to one model with prompts named JOB/ROLE


def train_many(
    jobs: Sequence[tuple[Denoiser, Recipe, State]], join: Join, at_once: int
) -> Generator[tuple[int, Step | UsageError]]:
    """Like `train`, for several jobs, `at_once` of them at a time. Yields (index of the job, its step). If a job fails,
    its last item is the error. Save a job's state only when its own step is yielded: at other times its next samples
    have already been drawn."""
    for _, _, state in jobs:
        state.adapters.detach()
    return run_batched([training_coroutine(model, recipe, state) for model, recipe, state in jobs], join, at_once)


def run_batched(
    coroutines: Iterable[TrainingCoroutine[T]], join: Join, at_once: int | None = None
) -> Generator[tuple[int, T | UsageError]]:
    """Run training coroutines, `at_once` of them at a time, or by default as many as fit into memory. Yields (index of
    the coroutine, what it yields); if one fails, its last item is the error. Coroutines on the same model share their
    passes. At the start, no adapters may be attached to the models."""
    waiting, alive, joint = enumerate(coroutines), list[_Job[T]](), _Joint(join)
    most, known = at_once or 1, bool(at_once)  # by default 1, until its passes have shown their memory use
    while True:
        for job in alive:
            yield from job.on()
        alive = [job for job in alive if job.request]
        while len(alive) < most and (found := next(waiting, None)):
            job = _Job(*found)
            yield from job.on()
            alive += [job] if job.request else []
        if not alive:
            return
        if known:
            joint.answer(alive)
        else:
            most, known = room_for(alive[0].pending.adapters.model, partial(joint.answer, alive)), True


def room_for(model: nn.Module, passes: Callable[[], None]) -> int:
    """How many jobs, 1 to MOST, fit into memory at once. It is estimated from the tensors that the passes of one job
    save for the backward pass."""
    tensors = (*model.parameters(), *model.buffers())  # fp8 weights are buffers
    weights = {one.untyped_storage()._cdata for one in tensors}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        passes()
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(1, min(MOST, int(SHARE * free / max(sum(seen.values()), 1))))


@dataclass
class _Job(Generic[T]):
    number: int
    coroutine: TrainingCoroutine[T]
    request: ForwardRequest | None = None  # the one that waits for an answer
    losses: list[Tensor] = field(default_factory=list)

    @property
    def pending(self) -> ForwardRequest:
        assert self.request
        return self.request

    def on(self) -> Generator[tuple[int, T | UsageError]]:
        """Run the job to its next request, or to its end, with its adapters attached. Yields what it yields."""
        adapters = self.request.adapters if self.request else None
        if adapters:
            adapters.attach_again()
        try:
            item = go_on(self.coroutine, self.losses) if self.request else next(self.coroutine, None)
            while item is not None and not isinstance(item, ForwardRequest):
                yield self.number, item
                item = go_on(self.coroutine, [])
            self.request = item
            adapters = item.adapters if item else adapters
        except UsageError as error:
            self.request = None
            yield self.number, error
        finally:
            if adapters:
                adapters.detach()


class _Joint:
    """The joint model and adapters of each group of jobs that share passes. They are remade when a group changes."""

    def __init__(self, join: Join) -> None:
        self.join = join
        self.made: dict[tuple[int, ...], tuple[Denoiser, Adapters]] = {}

    def answer(self, jobs: Sequence[_Job[T]]) -> None:
        groups: dict[tuple[int, bool, int], list[_Job[T]]] = {}
        for job in jobs:
            lengths = (len(one) for one in job.pending.model.prompts.values())  # long prompts have several chunks
            tokens = max(lengths, default=0)
            groups.setdefault((id(job.pending.adapters.model), job.pending.learns, tokens), []).append(job)
        used = [tuple(job.number for job in group) for group in groups.values()]
        self.made = {key: made for key, made in self.made.items() if key in used}
        for key, group in zip(used, groups.values(), strict=True):
            if key not in self.made:
                self.made[key] = self._make(group)
            _answer(group, *self.made[key])

    def _make(self, jobs: Sequence[_Job[T]]) -> tuple[Denoiser, Adapters]:
        model = self.join({str(job.number): job.pending.model for job in jobs})
        return model, common({str(job.number): job.pending.adapters for job in jobs})


def common(jobs: Mapping[str, Adapters]) -> Adapters:
    """The adapters of several jobs as one `Adapters`, named JOB/NAME. It uses the same factors, and is not attached to
    the model."""
    names = dict.fromkeys(name for job in jobs.values() for name in job.layers)
    first = next(iter(jobs.values()))
    made = Adapters.attach_named(first.model, list(names), first.kinds)
    for key, job in jobs.items():
        for name in job.names:
            made.add(f"{key}/{name}", job.of(name))
    made.detach()
    return made


def _answer(jobs: Sequence[_Job[T]], model: Denoiser, adapters: Adapters) -> None:
    """Run all branches of all jobs, in one batch for each shape of latents. Equal branches are placed side by side."""
    rows = [(job, job.pending, i) for job in jobs for i in range(len(job.pending.branches))]
    rows.sort(key=lambda one: (tuple(one[1].samples[one[2]].noisy.shape), _kind(one[1].branches[one[2]])))
    branches = [_named(request.branches[i], job.number) for job, request, i in rows]
    samples = [
        replace(sample, prompt=f"{job.number}/{sample.prompt}") if (sample := request.samples[i]).prompt else sample
        for job, request, i in rows
    ]
    adapters.attach_again()
    try:
        losses = answer(ForwardRequest(model, adapters, branches, samples, rows[0][1].learns), len(rows))
    finally:
        adapters.detach()
    for job in jobs:
        job.losses = [losses[0]] * len(job.pending.branches)
    for (job, _, i), loss in zip(rows, losses, strict=True):
        job.losses[i] = loss


@lru_cache(4096)
def _kind(branch: Branch) -> str:
    return repr(branch)


@lru_cache(4096)
def _named(branch: Branch, job: int) -> Branch:
    """The branch with the names of its adapters and prompts changed to JOB/NAME."""

    def active(one: Active) -> Active:
        return replace(
            one, adapter=f"{job}/{one.adapter}", prompt=None if one.prompt is None else f"{job}/{one.prompt}"
        )

    teacher = branch.teacher and _named(branch.teacher, job)
    named = tuple(active(one) for one in branch.active)
    return replace(branch, prompt=f"{job}/{branch.prompt}", active=named, teacher=teacher)
