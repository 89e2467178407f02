"""The passes through the model that a step asks for: losses, their gradients, and teachers' answers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.adapters import Adapters
from unbraid.layout import channels_last
from unbraid.lora import Branch
from unbraid.recipe import Ask, Denoiser, Sample

SMALL = 64  # positions of a latent, 8×8, up to which a processor convolves a single one more quickly with channels last


def answer(ask: Ask, at_once: int) -> list[Tensor]:
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
    target = torch.cat([sample.target for sample in samples])
    asked_now = [i for i, branch in enumerate(branches) if branch.teacher and not samples[i].taught]
    if asked_now:
        teachers = [teacher for i in asked_now if (teacher := branches[i].teacher)]
        answers = taught(model, adapters, teachers, [samples[i] for i in asked_now])
        target = target.index_copy(0, torch.tensor(asked_now, device=target.device), answers.to(target.dtype))
    with adapters.activate([branch.active for branch in branches], model.prompts):
        out = model.predict(samples, [branch.prompt for branch in branches])
        losses = F.mse_loss(
            out.float() if out.dtype in (torch.float16, torch.bfloat16) else out, target, reduction="none"
        )
        losses = losses.flatten(1).mean(1)
        weights = torch.tensor([branch.weight for branch in branches], dtype=losses.dtype, device=losses.device)
        if losses.requires_grad:  # a branch may have nothing that trains
            (losses * weights).sum().backward()
    return list(losses.detach())


@torch.no_grad()
def taught(model: Denoiser, adapters: Adapters, teachers: Sequence[Branch], samples: Sequence[Sample]) -> Tensor:
    """What teachers predict, `[b, c, h, w]`."""
    with adapters.activate([teacher.active for teacher in teachers], model.prompts):
        return model.predict(samples, [teacher.prompt for teacher in teachers])


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
