"""The passes through the model that a step asks for: losses, their gradients, and teachers' answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.core.adapters import Adapters
from unbraid.core.lora import Branch
from unbraid.core.memory_format import channels_last
from unbraid.core.recipe import Denoiser, ForwardRequest, Sample

SMALL = 64  # positions of a latent, 8×8, up to which a processor convolves a single one more quickly with channels last


def answer(ask: ForwardRequest, at_once: int) -> list[Tensor]:
    """The losses of each branch, unweighted; `at_once` of them share a pass."""
    losses, together = list[Tensor](), chunks(ask.samples, at_once)
    latents = [ask.samples[i].noisy for chunk in together for i in chunk if len(chunk) == 1]
    small = all(one.device.type == "cpu" and one[0, 0].numel() <= SMALL for one in latents)
    channels_last(ask.adapters.model, small and len(latents) == len(ask.samples))
    with torch.set_grad_enabled(ask.learns):
        for chunk in together:
            some, samples = [ask.branches[i] for i in chunk], [ask.samples[i] for i in chunk]
            losses += _backward(ask.model, ask.adapters, some, samples)
    return losses


def _backward(
    model: Denoiser, adapters: Adapters, branches: Sequence[Branch], samples: Sequence[Sample]
) -> list[Tensor]:
    """Losses of some branches, each a mean over its elements; their weighted gradients are accumulated."""

    def losses(*tensors: Tensor) -> Tensor:
        return _losses(model, adapters, branches, _filled(samples, *tensors))

    told = tuple((sample.prompt, sample.taught) for sample in samples)
    key = ("losses", tuple(branches), told, torch.is_grad_enabled())
    return list(_called(model, adapters, key, losses, samples).unbind())


def _losses(model: Denoiser, adapters: Adapters, branches: Sequence[Branch], samples: Sequence[Sample]) -> Tensor:
    """`[b]`. What a CUDA graph may hold: nothing here waits for the device."""
    targets = [sample.target for sample in samples]
    asked_now = [i for i, branch in enumerate(branches) if branch.teacher and not samples[i].taught]
    if asked_now:
        teachers = [teacher for i in asked_now if (teacher := branches[i].teacher)]
        answers = _taught(model, adapters, teachers, [samples[i] for i in asked_now])
        for i, target in zip(asked_now, answers.split(1), strict=True):
            targets[i] = target.to(targets[i].dtype)
    with adapters.activate([branch.active for branch in branches], model.prompts):
        out = model.predict(samples, [branch.prompt for branch in branches])
        losses = F.mse_loss(
            out.float() if out.dtype in (torch.float16, torch.bfloat16) else out, torch.cat(targets), reduction="none"
        )
        if all(sample.weight is None for sample in samples):
            losses = losses.flatten(1).mean(1)
        else:
            losses = torch.stack([_weighted(*both) for both in zip(losses, samples, strict=True)])
        if losses.requires_grad:  # a branch may have nothing that trains
            torch.stack([loss * branch.weight for loss, branch in zip(losses, branches, strict=True)]).sum().backward()
    return losses.detach()


def _weighted(errors: Tensor, sample: Sample) -> Tensor:
    """The mean of the errors `[c, h, w]` of one sample, by its weights."""
    weight = torch.ones_like(errors[:1]) if sample.weight is None else sample.weight[0]
    return (errors * weight).sum() / (len(errors) * weight.sum())


@torch.no_grad()
def taught(model: Denoiser, adapters: Adapters, teachers: Sequence[Branch], samples: Sequence[Sample]) -> Tensor:
    """What teachers predict, `[b, c, h, w]`."""

    def answers(*tensors: Tensor) -> Tensor:
        return _taught(model, adapters, teachers, _filled(samples, *tensors))

    key = ("taught", tuple(teachers), tuple(sample.prompt for sample in samples))
    return _called(model, adapters, key, answers, samples)


@torch.no_grad()
def _taught(model: Denoiser, adapters: Adapters, teachers: Sequence[Branch], samples: Sequence[Sample]) -> Tensor:
    with adapters.activate([teacher.active for teacher in teachers], model.prompts):
        return model.predict(samples, [teacher.prompt for teacher in teachers])


def _filled(samples: Sequence[Sample], *tensors: Tensor) -> list[Sample]:
    """The samples with other tensors, each a batch of theirs, in the order of `_tensors`."""
    rows = zip(*(one.split(1) for one in tensors), strict=True)
    return [
        replace(one, noisy=noisy, t=t, target=target, sizes=sizes, weight=weight[0] if weight else None)
        for one, (noisy, t, target, sizes, *weight) in zip(samples, rows, strict=True)
    ]


def _tensors(samples: Sequence[Sample]) -> list[Tensor]:
    """What differs from step to step, as batches; weights only where a sample has one."""
    rows = [(one.noisy, one.t, one.target, one.sizes) for one in samples]
    found = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    if any(one.weight is not None for one in samples):
        every = [torch.ones_like(one.noisy[:, :1]) if one.weight is None else one.weight for one in samples]
        found.append(torch.cat(every))
    return found


def _called(
    model: Denoiser,
    adapters: Adapters,
    key: tuple[object, ...],
    function: Callable[..., Tensor],
    samples: Sequence[Sample],
) -> Tensor:
    """A function of samples, as a CUDA graph where the model has them."""
    inputs = _tensors(samples)
    if model.graphs is None:
        return function(*inputs)
    keep = (model, adapters)  # so that nothing else can get their ids
    parameters = adapters.training() if torch.is_grad_enabled() else ()
    whole = (id(model), id(adapters), *key)
    return model.graphs(whole, function, inputs, parameters, lambda: (keep, model.constants(), adapters.constants()))


def chunks(samples: Sequence[Sample], at_once: int) -> list[list[int]]:
    """Neighbours of equal shape, at most `at_once` together."""
    found: list[list[int]] = []
    for i, sample in enumerate(samples):
        last = found[-1] if found else []
        if last and len(last) < at_once and samples[last[0]].noisy.shape == sample.noisy.shape:
            last.append(i)
        else:
            found.append([i])
    return found
