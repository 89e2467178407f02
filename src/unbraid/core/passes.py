"""The passes through the model that a training step needs: losses with their gradients, and the predictions of teachers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.core.adapters import Adapters
from unbraid.core.lora import Branch
from unbraid.core.memory_format import channels_last
from unbraid.core.recipe import Denoiser, ForwardRequest, Sample

SMALL = 64  # positions of a latent (8×8): a CPU convolves a single latent up to this size faster with channels last


def answer(request: ForwardRequest, at_once: int) -> list[Tensor]:
    """The unweighted loss of each branch of a request, scalars. Up to `at_once` branches share a pass. If the request
    `learns`, the weighted gradients are added to those of the adapters."""
    losses, together = list[Tensor](), chunks(request.samples, at_once)
    latents = [request.samples[i].noisy for chunk in together for i in chunk if len(chunk) == 1]
    small = all(one.device.type == "cpu" and one[0, 0].numel() <= SMALL for one in latents)
    channels_last(request.adapters.model, small and len(latents) == len(request.samples))
    with torch.set_grad_enabled(request.learns):
        for chunk in together:
            some, samples = [request.branches[i] for i in chunk], [request.samples[i] for i in chunk]
            losses += _backward(request.model, request.adapters, some, samples)
    return losses


def _backward(
    model: Denoiser, adapters: Adapters, branches: Sequence[Branch], samples: Sequence[Sample]
) -> list[Tensor]:
    """The loss of each branch, a mean over the elements of its latent. Accumulates the weighted gradients."""

    def losses(*tensors: Tensor) -> Tensor:
        return _losses(model, adapters, branches, _filled(samples, *tensors))

    kinds = tuple((sample.prompt, sample.taught) for sample in samples)
    key = ("losses", tuple(branches), kinds, torch.is_grad_enabled())
    return list(_called(model, adapters, key, losses, samples).unbind())


def _losses(model: Denoiser, adapters: Adapters, branches: Sequence[Branch], samples: Sequence[Sample]) -> Tensor:
    """The losses, `[b]`. Nothing here may wait for the device, so that it can be captured in a CUDA graph."""
    targets = [sample.target for sample in samples]
    untaught = [i for i, branch in enumerate(branches) if branch.teacher and not samples[i].taught]
    if untaught:
        teachers = [teacher for i in untaught if (teacher := branches[i].teacher)]
        predictions = _teacher_predictions(model, adapters, teachers, [samples[i] for i in untaught])
        for i, target in zip(untaught, predictions.split(1), strict=True):
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
        losses = _scaled(model, losses, branches, samples)
        if losses.requires_grad:  # False if none of the branches trains anything
            torch.stack([loss * branch.weight for loss, branch in zip(losses, branches, strict=True)]).sum().backward()
    return losses.detach()


def _scaled(model: Denoiser, losses: Tensor, branches: Sequence[Branch], samples: Sequence[Sample]) -> Tensor:
    """The losses `[b]` times the factors of their timesteps: those of the samples, but for branches with `loss="x0"` the ones
    that convert errors of predictions to errors of clean latents."""
    in_x0 = [branch.loss == "x0" for branch in branches]
    if not any(in_x0) and all(sample.factor is None for sample in samples):
        return losses
    factors = torch.cat([_factor(sample) for sample in samples])
    if any(in_x0):
        clean = model.x0_factor(torch.cat([sample.t for sample in samples])).to(losses.dtype).unbind()
        factors = torch.stack([c if x0 else own for own, c, x0 in zip(factors.unbind(), clean, in_x0, strict=True)])
    return losses * factors


def _weighted(errors: Tensor, sample: Sample) -> Tensor:
    """The weighted mean of one sample's errors `[c, h, w]`."""
    weight = torch.ones_like(errors[:1]) if sample.weight is None else sample.weight[0]
    return (errors * weight).sum() / (len(errors) * weight.sum())


@torch.no_grad()
def teacher_predictions(
    model: Denoiser, adapters: Adapters, teachers: Sequence[Branch], samples: Sequence[Sample]
) -> Tensor:
    """What the teachers predict for the samples, `[b, c, h, w]`."""

    def predictions(*tensors: Tensor) -> Tensor:
        return _teacher_predictions(model, adapters, teachers, _filled(samples, *tensors))

    key = ("teachers", tuple(teachers), tuple(sample.prompt for sample in samples))
    return _called(model, adapters, key, predictions, samples)


@torch.no_grad()
def _teacher_predictions(
    model: Denoiser, adapters: Adapters, teachers: Sequence[Branch], samples: Sequence[Sample]
) -> Tensor:
    with adapters.activate([teacher.active for teacher in teachers], model.prompts):
        return model.predict(samples, [teacher.prompt for teacher in teachers])


def _filled(samples: Sequence[Sample], *tensors: Tensor) -> list[Sample]:
    """Copies of the samples with other tensors. `tensors`: one batch for each name, in the order of `_names`."""
    rows = zip(*(one.split(1) for one in tensors), strict=True)
    return [
        replace(one, **dict(zip(_names(samples), row, strict=True))) for one, row in zip(samples, rows, strict=True)
    ]


def _tensors(samples: Sequence[Sample]) -> list[Tensor]:
    """The tensors of samples that differ from step to step, as one batch for each name, in the order of `_names`."""
    usual = {"weight": lambda one: torch.ones_like(one.noisy[:, :1]), "factor": _factor}
    found = [[getattr(one, name) for one in samples] for name in _names(samples)]
    return [
        torch.cat([usual[name](one) if part is None else part for one, part in zip(samples, parts, strict=True)])
        for name, parts in zip(_names(samples), found, strict=True)
    ]


def _names(samples: Sequence[Sample]) -> list[str]:
    """The names of the tensors that differ from step to step. The last two are left out if no sample has them."""
    optional = [name for name in ("weight", "factor") if any(getattr(one, name) is not None for one in samples)]
    return ["noisy", "t", "target", "sizes", *optional]


def _factor(sample: Sample) -> Tensor:
    return sample.t.new_ones(1, dtype=torch.float32) if sample.factor is None else sample.factor


def _called(
    model: Denoiser,
    adapters: Adapters,
    key: tuple[object, ...],
    function: Callable[..., Tensor],
    samples: Sequence[Sample],
) -> Tensor:
    """Call `function` with the tensors of the samples, through a CUDA graph if the model has graphs."""
    inputs = _tensors(samples)
    if model.graphs is None:
        return function(*inputs)
    keep = (model, adapters)  # kept alive, so that no other object can get the ids in the key
    parameters = adapters.training() if torch.is_grad_enabled() else ()
    whole = (id(model), id(adapters), *key)
    return model.graphs(whole, function, inputs, parameters, lambda: (keep, model.constants(), adapters.constants()))


def chunks(samples: Sequence[Sample], at_once: int) -> list[list[int]]:
    """Indices of neighbouring samples of equal shape, in chunks of at most `at_once`."""
    found: list[list[int]] = []
    for i, sample in enumerate(samples):
        last = found[-1] if found else []
        if last and len(last) < at_once and samples[last[0]].noisy.shape == sample.noisy.shape:
            last.append(i)
        else:
            found.append([i])
    return found
