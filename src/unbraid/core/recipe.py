"""A training run as data: what every step is, and what the trainer needs of a base model."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from unbraid.core.adapters import Adapters
from unbraid.core.graphs import Graphs
from unbraid.core.layers import ATTENTION
from unbraid.core.lora import Branch, Noise
from unbraid.core.optim import Rates, adamw

T = TypeVar("T")
Shared = Literal["noise", "timestep", "crop"]
Hook = Callable[[Adapters, int], None]
Last = Callable[[Adapters, int], bool | None]


@dataclass(frozen=True)
class Passes:
    """How the branches of one step go through the model."""

    shared: frozenset[Shared] = frozenset()  # what their samples have in common
    batch_size: int = 1  # samples of each branch
    in_turn: bool = False  # one optimiser step after every branch, on samples drawn together
    fixed_teachers: bool = False  # no teacher uses what trains: all targets can be computed before the first step


@dataclass(frozen=True)
class Optimization:
    """How gradients change the adapters."""

    optimizer: Callable[[Adapters, Rates], torch.optim.Optimizer] = adamw
    clip: float | None = 1.0  # largest norm of all gradients together
    rate_factor: Callable[[int], float] | None = None  # step → factor of all learning rates in it


@dataclass(frozen=True)
class Hooks:
    """What a method does within each step. Each hook is called with the adapters and the index of the step."""

    penalty: Callable[[Adapters, int], Tensor | None] | None = None  # is added to the loss
    after_backward: Hook | None = None  # may change the gradients
    after_step: Last | None = None  # True: this was the last step


@dataclass(frozen=True)
class Stop:
    """Early stopping: every so many steps the loss of these branches, on samples that stay the same; after `patience` times
    without a better one the run ends, and the adapters are those of the best."""

    branches: tuple[Branch, ...]
    every: int
    patience: int
    samples: int = 4  # of each branch


@dataclass(frozen=True)
class Recipe:
    """A training run as data."""

    prepare: Callable[[Adapters, torch.Generator], None]  # adds the adapters
    branches: Callable[[int], tuple[Branch, ...]]
    rates: Rates
    steps: int
    passes: Passes = Passes()
    optimization: Optimization = Optimization()
    hooks: Hooks = Hooks()
    targets: str = ATTENTION  # which linear layers carry adapters: a name in `Layers.targets`, or a regular expression
    stop: Stop | None = None

    def examples(self, step: int) -> tuple[Branch, ...]:
        """The branches of a step, each once for every sample of it, with its share of the weight."""
        size = self.passes.batch_size
        return tuple(replace(one, weight=one.weight / size) for one in self.branches(step) for _ in range(size))


@dataclass(frozen=True)
class Sample:
    """One noisy training example (b = 1)."""

    noisy: Tensor  # [1, c, h, w]
    t: Tensor  # [1], the scheduler's training timesteps
    target: Tensor  # as noisy: noise or velocity
    sizes: Tensor  # [1, 6]: original height and width, crop top and left, target height and width
    prompt: str | None = None  # role of the picture's own caption, in place of the branch's prompt
    taught: bool = False  # the target is its teacher's answer already
    weight: Tensor | None = (
        None  # [1, 1, h, w], 0 to 1: how much of the loss each place of the latent has; none: all alike
    )
    factor: Tensor | None = None  # [1]: the loss is multiplied by this; none: 1


@runtime_checkable
class Denoiser(Protocol):
    """What the trainer needs of a base model; `base.RunData` is the one for diffusers."""

    prompts: Mapping[str, Tensor]  # role → [tokens, channels], for adapters that read their own prompt
    graphs: Graphs | None  # where steps are captured and replayed; None: they run as they are

    def draw(
        self, images: Sequence[str], shared: frozenset[Shared], rng: torch.Generator, noises: Sequence[Noise] = ()
    ) -> list[Sample]: ...

    def predict(self, samples: Sequence[Sample], prompts: Sequence[str]) -> Tensor: ...

    def x0_factor(self, t: Tensor) -> Tensor:
        """The squared error of x̂_0 at timesteps `t [b]`, as a multiple of that of the prediction it comes from: `[b]`."""
        ...

    def constants(self) -> Sequence[Tensor]:
        """What predictions read and the model may forget: a captured step keeps it alive."""
        ...


@dataclass(frozen=True)
class ForwardRequest:
    """What a step wants to know: the losses of some branches, and, if it `learns`, their weighted gradients in the adapters."""

    model: Denoiser
    adapters: Adapters
    branches: Sequence[Branch]
    samples: Sequence[Sample]
    learns: bool = True


TrainingCoroutine = Generator[T | ForwardRequest, list[Tensor], None]


def go_on(script: TrainingCoroutine[T], losses: list[Tensor]) -> T | ForwardRequest | None:
    """Send an answer, or an empty one where nothing was asked; what comes next, None at the end."""
    try:
        return script.send(losses)
    except StopIteration:
        return None
