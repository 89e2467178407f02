"""The trainer: a recipe says what every step is; `train` yields the steps and does nothing else.

It does not print, save or plot. The caller looks at each `Step`, and asks `State` for what to save. `course` is the same
without the passes through the model: it asks for them, so that several courses can have theirs together (unbraid.many).
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import TypeVar

import torch
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.passes import answer, chunks, taught
from unbraid.core.recipe import Ask, Denoiser, Recipe, Sample, Script, Stop, go_on

T = TypeVar("T")
LOOK = 16  # steps between looks at the figures on an accelerator


@dataclass(frozen=True, eq=False)
class Step:
    """What a step was like. Its figures stay on the device until they are asked for: reading them waits for the step to be done."""

    index: int
    figures: Tensor  # [2 + branches]: loss, norm, and each branch's loss, unweighted

    @property
    def loss(self) -> float:
        """Weighted sum over branches, plus penalty."""
        return float(self.figures[0])

    @property
    def norm(self) -> float:
        """Of all gradients, before clipping."""
        return float(self.figures[1])

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(self.figures[2:].tolist())


@dataclass
class State:
    """Everything that a run needs to go on as if it had never stopped."""

    adapters: Adapters
    optimizer: torch.optim.Optimizer
    rng: torch.Generator
    step: int = 0
    least: float = (
        inf  # the best loss that early stopping has seen, how often it was not bettered since, and the adapters then
    )
    waited: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    unseen: list[Step] = field(default_factory=list)  # whose figures nobody has looked at

    @classmethod
    def fresh(cls, adapters: Adapters, recipe: Recipe, rng: torch.Generator) -> "State":
        recipe.prepare(adapters, rng)
        adapters.pack()
        if not recipe.steps:  # done when it is prepared
            return cls(adapters, torch.optim.AdamW([{"params": []}]), rng)
        return cls(adapters, recipe.optimizer(adapters, recipe.rates), rng)

    def tensors(self) -> dict[str, Tensor]:
        """A flat, detached snapshot: adapters with their buffers, optimiser moments, random state, step."""
        self.look()
        out = {f"adapter/{key}": value for key, value in self._modules().state_dict().items()}
        out |= {f"best/{key}": value for key, value in self.best.items()}
        out["least"], out["waited"] = torch.tensor(self.least, dtype=torch.float64), torch.tensor(self.waited)
        for i, moments in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer/{i}/{key}": value for key, value in moments.items()}
        out["rng"], out["step"] = self.rng.get_state(), torch.tensor(self.step)
        return {key: value.detach().cpu().clone().contiguous() for key, value in out.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo `tensors()`. Raises UsageError if the snapshot is of another recipe, or none."""
        fix = "Resume with the settings of run.toml, or start anew in another folder."
        try:
            self._restore(tensors)
        except (
            RuntimeError,
            KeyError,
            ValueError,
            TypeError,
        ) as error:  # what torch says of other shapes, names and random states
            raise UsageError("the saved state does not fit these settings", "resume", fix) from error

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        adapters = {k.removeprefix("adapter/"): v for k, v in tensors.items() if k.startswith("adapter/")}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, i, what = key.split("/")
                moments.setdefault(int(i), {})[what] = value
        groups = self.optimizer.state_dict()["param_groups"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if max(moments, default=0) >= len(parameters):
            raise ValueError(
                "moments of tensors that are not there: saved by an unbraid that did not stack its factors"
            )
        if any(some.keys() != one.keys() for one in moments.values() for some in moments.values()):
            raise ValueError("a moment is missing")
        if not all(_fits(moments[i], parameters[i]) for i in moments):
            raise ValueError("moments of other shapes")
        step, least, waited = int(tensors["step"]), float(tensors["least"]), int(tensors["waited"])
        best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
        if step < 0 or (best and best.keys() != adapters.keys()):
            raise ValueError("no step, or other adapters")
        self._modules().load_state_dict(adapters)
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.rng.set_state(tensors["rng"])
        self.step, self.least, self.waited, self.best = step, least, waited, best

    def saw(self, step: Step) -> None:
        """Take note of a step; look at its figures at once if that costs nothing, else once in a while: looking waits for the device."""
        self.unseen.append(step)
        if step.figures.device.type == "cpu" or len(self.unseen) == LOOK:
            self.look()

    def look(self) -> None:
        """Raise UsageError if figures of the last steps are not finite."""
        steps, self.unseen = self.unseen, []
        if not steps:
            return
        fine = torch.isfinite(torch.stack([step.figures[:2] for step in steps]).cpu()).all(1)
        if bool(fine.all()):
            return
        step = steps[int((~fine).nonzero()[0])]
        fix = "Lower the learning rates, or use full precision; --resume goes on from the last saved state."
        raise UsageError(f"the loss is {step.loss}, its gradient's norm {step.norm}", f"step {step.index}", fix)

    def judged(self, loss: float, patience: int) -> bool:
        """Take a loss of early stopping; whether to go on."""
        self.waited += 1
        if loss < self.least:
            self.least, self.waited = loss, 0
            self.best = {key: value.detach().clone() for key, value in self._modules().state_dict().items()}
        return self.waited < patience

    def take_best(self) -> None:
        if self.best:
            self._modules().load_state_dict(self.best)

    def _modules(self) -> nn.ModuleDict:
        layers = {name.replace(".", "/"): layer.adapters for name, layer in self.adapters.layers.items()}
        return nn.ModuleDict(layers)


def _fits(moments: Mapping[str, Tensor], p: Tensor) -> bool:
    """Whether an optimiser's moments are those of a parameter; 8-bit ones are of several, in a row."""
    return "exp_avg_scale" in moments or all(
        moments[key].ndim == p.ndim and all(m in (1, n) for m, n in zip(moments[key].shape, p.shape, strict=True))
        for key in ("exp_avg", "exp_avg_sq")
        if key in moments
    )


def train(
    model: Denoiser, recipe: Recipe, state: State, at_once: int = 1, lessons: Sequence[Sequence[Sample]] | None = None
) -> Iterator[Step]:
    """Run `recipe` from `state.step` to its end, one optimiser step per item. `at_once` branches share a forward
    pass (equal shapes only); the result is the same, memory and speed are not. `lessons`: see there."""
    return alone(course(model, recipe, state, lessons), at_once)


def course(
    model: Denoiser, recipe: Recipe, state: State, lessons: Sequence[Sequence[Sample]] | None = None
) -> Script[Step]:
    """`train`, but for the passes: whoever runs it answers each `Ask` with its losses."""
    while state.step < recipe.steps:
        step = yield from _step(model, recipe, state, lessons)
        if recipe.stop and state.step % recipe.stop.every == 0:
            goes_on = yield from _goes_on(model, recipe, recipe.stop, state)
            if not goes_on:
                state.step = recipe.steps
        if state.step == recipe.steps:
            state.take_best()
        yield step


def alone(script: Script[T], at_once: int) -> Iterator[T]:
    """Run what asks for passes by itself; what else it yields is handed on."""
    said = next(script, None)
    while said is not None:
        if isinstance(said, Ask):
            said = go_on(script, answer(said, at_once))
        else:
            yield said
            said = go_on(script, [])


def lessons(
    model: Denoiser, recipe: Recipe, adapters: Adapters, rng: torch.Generator, begin: int = 0, at_once: int = 8
) -> list[list[Sample]]:
    """The samples of every step as a run would draw them, each with its teacher's answer as its target; for recipes with
    `fixed_teachers`. Teachers are asked in batches of `at_once`; those of steps before `begin` are not asked."""
    plan = [recipe.branches(i) for i in range(recipe.steps)]
    drawn = [model.draw([branch.image for branch in branches], recipe.shared, rng) for branches in plan]
    asked = [(i, j) for i, branches in enumerate(plan) for j, one in enumerate(branches) if i >= begin and one.teacher]
    for chunk in chunks([drawn[i][j] for i, j in asked], at_once):
        places = [asked[k] for k in chunk]
        teachers = [teacher for i, j in places if (teacher := plan[i][j].teacher)]
        answers = taught(model, adapters, teachers, [drawn[i][j] for i, j in places])
        for (i, j), target in zip(places, answers.split(1), strict=True):
            drawn[i][j] = replace(drawn[i][j], target=target.to(drawn[i][j].target.dtype), taught=True)
    return drawn


def _step(
    model: Denoiser, recipe: Recipe, state: State, lessons: Sequence[Sequence[Sample]] | None
) -> Generator[Ask, list[Tensor], Step]:
    adapters, index = state.adapters, state.step
    branches = recipe.branches(index)
    samples = lessons[index] if lessons else model.draw([branch.image for branch in branches], recipe.shared, state.rng)
    losses: list[Tensor] = []
    size = 1 if recipe.in_turn else max(len(branches), 1)
    for i in range(0, len(branches), size):
        losses += yield Ask(model, adapters, branches[i : i + size], samples[i : i + size])
        if i + size < len(branches):
            _clip(state.optimizer, recipe.clip)
            state.optimizer.step()
            state.optimizer.zero_grad()
    total = sum(branch.weight * loss for branch, loss in zip(branches, losses, strict=True))
    penalty = recipe.penalty(adapters, index) if recipe.penalty else None
    if penalty is not None:
        penalty.backward()
        total = total + penalty.detach()
    if recipe.after_backward:
        recipe.after_backward(adapters, index)
    norm = _clip(state.optimizer, recipe.clip)
    assert isinstance(total, Tensor)
    done = Step(index, torch.stack([total, norm.to(total), *losses]))
    state.saw(done)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    if recipe.after_step and recipe.after_step(adapters, index):
        state.step = recipe.steps
    if state.step == recipe.steps:
        state.look()
    return done


def _goes_on(model: Denoiser, recipe: Recipe, stop: Stop, state: State) -> Generator[Ask, list[Tensor], bool]:
    """Early stopping's look at the mean loss of its branches."""
    rng = torch.Generator().manual_seed(0)
    branches = [branch for branch in stop.branches for _ in range(stop.samples)]
    samples = [model.draw([branch.image], recipe.shared, rng)[0] for branch in branches]
    losses = yield Ask(model, state.adapters, branches, samples, learns=False)
    return state.judged(float(torch.stack(losses).mean()), stop.patience)


def _clip(optimizer: torch.optim.Optimizer, largest: float | None) -> Tensor:
    """The norm of all gradients, scaled down to `largest`: torch's clip_grad_norm_ without its grouping of tensors by device."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if largest is not None:
        torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
