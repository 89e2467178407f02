"""The trainer: a recipe says what every step is; `train` yields the steps and does nothing else.

It does not print, save or plot. The caller looks at each `Step`, and asks `State` for what to save.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.adapters import Adapters
from unbraid.errors import UsageError
from unbraid.lora import Branch
from unbraid.recipe import Denoiser, Recipe, Sample, Stop


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
    unseen: Step | None = None  # whose figures nobody has looked at

    @classmethod
    def fresh(cls, adapters: Adapters, recipe: Recipe, rng: torch.Generator) -> "State":
        recipe.prepare(adapters, rng)
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
        """Undo `tensors()`. Raises UsageError if the snapshot is of another recipe."""
        adapters = {k.removeprefix("adapter/"): v for k, v in tensors.items() if k.startswith("adapter/")}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, i, what = key.split("/")
                moments.setdefault(int(i), {})[what] = value
        try:
            self._modules().load_state_dict(adapters)
        except RuntimeError as error:
            fix = "Resume with the settings of run.toml, or start anew in another folder."
            raise UsageError("the saved state does not fit these settings", "resume", fix) from error
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.rng.set_state(tensors["rng"])
        self.step = int(tensors["step"])
        self.least, self.waited = float(tensors["least"]), int(tensors["waited"])
        self.best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}

    def look(self) -> None:
        """Raise UsageError if the last step's figures are not finite."""
        step, self.unseen = self.unseen, None
        if step and not bool(torch.isfinite(step.figures[:2]).all()):
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


def train(
    model: Denoiser, recipe: Recipe, state: State, at_once: int = 1, lessons: Sequence[Sequence[Sample]] | None = None
) -> Iterator[Step]:
    """Run `recipe` from `state.step` to its end, one optimiser step per item. `at_once` branches share a forward
    pass (equal shapes only); the result is the same, memory and speed are not. `lessons`: see there."""
    while state.step < recipe.steps:
        step = _step(model, recipe, state, at_once, lessons)
        if recipe.stop and state.step % recipe.stop.every == 0 and not _goes_on(model, recipe, recipe.stop, state):
            state.step = recipe.steps
        if state.step == recipe.steps:
            state.take_best()
        yield step


def lessons(
    model: Denoiser, recipe: Recipe, adapters: Adapters, rng: torch.Generator, begin: int = 0, at_once: int = 8
) -> list[list[Sample]]:
    """The samples of every step as a run would draw them, each with its teacher's answer as its target; for recipes with
    `fixed_teachers`. Teachers are asked in batches of `at_once`; those of steps before `begin` are not asked."""
    plan = [recipe.branches(i) for i in range(recipe.steps)]
    drawn = [model.draw([branch.image for branch in branches], recipe.shared, rng) for branches in plan]
    asked = [(i, j) for i, branches in enumerate(plan) for j, one in enumerate(branches) if i >= begin and one.teacher]
    for chunk in _chunks([drawn[i][j] for i, j in asked], at_once):
        places = [asked[k] for k in chunk]
        teachers = [teacher for i, j in places if (teacher := plan[i][j].teacher)]
        answers = _answers(model, adapters, teachers, [drawn[i][j] for i, j in places])
        for (i, j), answer in zip(places, answers.split(1), strict=True):
            drawn[i][j] = replace(drawn[i][j], target=answer.to(drawn[i][j].target.dtype), taught=True)
    return drawn


def _step(
    model: Denoiser, recipe: Recipe, state: State, at_once: int, lessons: Sequence[Sequence[Sample]] | None
) -> Step:
    adapters, index = state.adapters, state.step
    branches = recipe.branches(index)
    samples = lessons[index] if lessons else model.draw([branch.image for branch in branches], recipe.shared, state.rng)
    losses: list[Tensor] = []
    chunks = _chunks(samples, 1 if recipe.in_turn else at_once)
    for chunk in chunks:
        some = [branches[i] for i in chunk]
        losses += _backward(model, adapters, some, [samples[i] for i in chunk])
        if recipe.in_turn and chunk is not chunks[-1]:
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
    state.look()  # at the step before, which is done by now: no waiting for this one on an accelerator
    assert isinstance(total, Tensor)
    done = state.unseen = Step(index, torch.stack([total, norm.to(total), *losses]))
    if total.device.type == "cpu":
        state.look()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    if recipe.after_step and recipe.after_step(adapters, index):
        state.step = recipe.steps
    if state.step == recipe.steps:
        state.look()
    return done


def _backward(
    model: Denoiser, adapters: Adapters, branches: Sequence[Branch], samples: Sequence[Sample]
) -> list[Tensor]:
    """Losses of some branches, each a mean over its elements; their weighted gradients are accumulated."""
    target = torch.cat([sample.target for sample in samples])
    asked_now = [i for i, branch in enumerate(branches) if branch.teacher and not samples[i].taught]
    if asked_now:
        teachers = [teacher for i in asked_now if (teacher := branches[i].teacher)]
        answers = _answers(model, adapters, teachers, [samples[i] for i in asked_now])
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
def _answers(model: Denoiser, adapters: Adapters, teachers: Sequence[Branch], samples: Sequence[Sample]) -> Tensor:
    with adapters.activate([teacher.active for teacher in teachers], model.prompts):
        return model.predict(samples, [teacher.prompt for teacher in teachers])


@torch.no_grad()
def _goes_on(model: Denoiser, recipe: Recipe, stop: Stop, state: State) -> bool:
    """Early stopping's look at the mean loss of its branches."""
    rng, losses = torch.Generator().manual_seed(0), []
    for branch in stop.branches:
        for sample in [model.draw([branch.image], recipe.shared, rng)[0] for _ in range(stop.samples)]:
            losses += _backward(model, state.adapters, [branch], [sample])
    return state.judged(float(torch.stack(losses).mean()), stop.patience)


def _chunks(samples: Sequence[Sample], at_once: int) -> list[list[int]]:
    """Neighbours of equal shape, at most `at_once` together."""
    chunks: list[list[int]] = []
    for i, sample in enumerate(samples):
        last = chunks[-1] if chunks else []
        if last and len(last) < at_once and samples[last[0]].noisy.shape == sample.noisy.shape:
            last.append(i)
        else:
            chunks.append([i])
    return chunks


def _clip(optimizer: torch.optim.Optimizer, largest: float | None) -> Tensor:
    """The norm of all gradients, scaled down to `largest`: torch's clip_grad_norm_ without its grouping of tensors by device."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if largest is not None:
        torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
