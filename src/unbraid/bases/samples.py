"""Training samples: encoded pictures with noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.bases.devices import sent_to
from unbraid.bases.families.noising import Process
from unbraid.common.errors import UsageError
from unbraid.core.lora import Noise, Span
from unbraid.core.recipe import Sample, Shared

MOST_DRAWS = 10_000  # of a timestep, until it lies in the part that is wanted
Once = Callable[[Shared, object, Callable[[], Tensor]], Tensor]  # draws what is not shared, or not there yet


@dataclass(frozen=True)
class Picture:
    """An encoded picture: mean and standard deviation of its scaled latent, `[c, h, w]` each, and SDXL's six size
    numbers, `[6]`."""

    mean: Tensor
    std: Tensor
    sizes: Tensor
    prompts: tuple[str, ...] = ()  # roles of its own captions; each step chooses one of them at random
    weight: Tensor | None = None  # [1, h, w]: how much each position of the latent counts in the loss


def drawn(
    process: Process,
    pictures: Sequence[Sequence[Picture]],
    noises: Sequence[Noise],
    shared: frozenset[Shared],
    rng: torch.Generator,
) -> list[Sample]:
    """One sample per branch: x_t, t and the target. `pictures`: those to choose from, for each branch. `noises`: how the noise
    of each branch is drawn. Random numbers are drawn on the CPU, so that a seed gives the same samples on every device."""
    kept: dict[tuple[Shared, object], Tensor] = {}

    def once(what: Shared, how: object, make: Callable[[], Tensor]) -> Tensor:
        if what not in shared or (what, how) not in kept:
            kept[what, how] = make()
        return kept[what, how]

    return [_sample(process, some, noise, once, rng) for some, noise in zip(pictures, noises, strict=True)]


def _sample(process: Process, pictures: Sequence[Picture], how: Noise, once: Once, rng: torch.Generator) -> Sample:
    picture = pictures[int(torch.randint(len(pictures), (), generator=rng))]
    shape, device = picture.mean.shape, picture.mean.device
    latent = picture.mean + picture.std * sent_to(torch.randn(shape, generator=rng), device).to(picture.std)
    tokens = shape[-2] * shape[-1] // 4
    t = once("timestep", how.part, lambda: sent_to(_timestep(process, tokens, how.part, rng), device))
    noise = once("noise", (how.offset, shape), lambda: sent_to(_noise(shape, how.offset, rng), device).to(picture.mean))
    noisy, target = process.corrupt(latent[None], noise[None], t)
    own = picture.prompts
    prompt = own[int(torch.randint(len(own), (), generator=rng))] if len(own) > 1 else (*own, None)[0]
    weight = None if picture.weight is None else picture.weight[None]
    return Sample(noisy, t, target, picture.sizes[None], prompt, weight=weight, factor=process.factor(t))


def _timestep(process: Process, tokens: int, part: Span, rng: torch.Generator) -> Tensor:
    """A timestep `[1]`, as the process draws it, but from this part of the way from noise to picture alone. Raises UsageError
    if the process draws hardly any there."""
    for _ in range(MOST_DRAWS):
        t = process.draw_timestep(rng, tokens)
        if part[0] <= 1 - process.time(t) <= part[1]:
            return t
    what = f"this base hardly trains with timesteps between {part[0]:g} and {part[1]:g}"
    raise UsageError(what, "content_part, style_part", "Give a larger part, or other --timesteps.")


def _noise(shape: torch.Size, offset: float, rng: torch.Generator) -> Tensor:
    """The noise of a latent `[c, h, w]`, with an offset per channel unless its standard deviation is 0."""
    noise = torch.randn(shape, generator=rng)
    return noise + offset * torch.randn(shape[0], 1, 1, generator=rng) if offset else noise
