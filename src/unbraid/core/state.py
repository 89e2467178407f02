"""The state of a training: what it needs to go on as if it had never stopped, and the figures of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.recipe import Recipe

CHECK_EVERY = 16  # steps between checks of the figures on an accelerator


@dataclass(frozen=True, eq=False)
class Step:
    """The figures of one step. They stay on the device until they are read, because reading them waits for the step to
    finish."""

    index: int
    figures: Tensor  # [2 + branches]: loss, norm, and each branch's loss, unweighted

    @property
    def loss(self) -> float:
        """Weighted sum over branches, plus penalty."""
        return float(self.figures[0])

    @property
    def norm(self) -> float:
        """The norm of all gradients together, before clipping."""
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
    # Early stopping: the lowest validation loss, how many checks ago that was, and the adapters at that time
    least: float = inf
    waited: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    unchecked: list[Step] = field(default_factory=list)  # steps whose figures have not been checked yet

    @classmethod
    def fresh(cls, adapters: Adapters, recipe: Recipe, rng: torch.Generator) -> "State":
        """The state before the first step: adapters as the recipe prepares them, packed, and its optimiser."""
        recipe.prepare(adapters, rng)
        adapters.pack()
        if not recipe.steps:  # nothing is trained: preparing the adapters was all
            return cls(adapters, torch.optim.AdamW([{"params": []}]), rng)
        return cls(adapters, recipe.optimization.optimizer(adapters, recipe.rates), rng)

    def tensors(self) -> dict[str, Tensor]:
        """A flat, detached snapshot: adapters with their buffers, optimiser moments, random state, step."""
        self.raise_if_not_finite()
        out = {f"adapter/{key}": value for key, value in self._modules().state_dict().items()}
        out |= {f"best/{key}": value for key, value in self.best.items()}
        out["least"], out["waited"] = torch.tensor(self.least, dtype=torch.float64), torch.tensor(self.waited)
        for i, moments in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer/{i}/{key}": torch.as_tensor(value) for key, value in moments.items()}
        out["rng"], out["step"] = self.rng.get_state(), torch.tensor(self.step)
        return {key: value.detach().cpu().clone().contiguous() for key, value in out.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a snapshot made by `tensors`. Raises UsageError if it is of another recipe, or is no snapshot."""
        fix = "Resume with the settings of run.toml, or start anew in another folder."
        try:
            self._restore(tensors)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            # the errors of torch for other shapes, other names and damaged random states
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
            raise ValueError("moments of tensors that do not exist: saved by a version that did not stack factors")
        if any(some.keys() != one.keys() for one in moments.values() for some in moments.values()):
            raise ValueError("a moment is missing")
        if not all(_fits(moments[i], parameters[i]) for i in moments):
            raise ValueError("moments with wrong shapes")
        step, least, waited = int(tensors["step"]), float(tensors["least"]), int(tensors["waited"])
        best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
        if step < 0 or (best and best.keys() != adapters.keys()):
            raise ValueError("a negative step, or other adapters")
        self._modules().load_state_dict(adapters)
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.rng.set_state(tensors["rng"])
        self.step, self.least, self.waited, self.best = step, least, waited, best

    def record(self, step: Step) -> None:
        """Record a step. On the CPU its figures are checked immediately. On an accelerator they are checked every
        `CHECK_EVERY` steps, because a check waits for the device."""
        self.unchecked.append(step)
        if step.figures.device.type == "cpu" or len(self.unchecked) == CHECK_EVERY:
            self.raise_if_not_finite()

    def raise_if_not_finite(self) -> None:
        """Raise UsageError if figures of the last steps are not finite."""
        steps, self.unchecked = self.unchecked, []
        if not steps:
            return
        fine = torch.isfinite(torch.stack([step.figures[:2] for step in steps]).cpu()).all(1)
        if bool(fine.all()):
            return
        step = steps[int((~fine).nonzero()[0])]
        fix = "Lower the learning rates, or use full precision; --resume goes on from the last saved state."
        raise UsageError(f"the loss is {step.loss}, its gradient's norm {step.norm}", f"step {step.index}", fix)

    def record_validation(self, loss: float, patience: int) -> bool:
        """Record a validation loss of early stopping. Returns whether to continue."""
        self.waited += 1
        if loss < self.least:
            self.least, self.waited = loss, 0
            self.best = {key: value.detach().clone() for key, value in self._modules().state_dict().items()}
        return self.waited < patience

    def take_best(self) -> None:
        """Go back to the adapters with the lowest validation loss, if there was early stopping."""
        if self.best:
            self._modules().load_state_dict(self.best)

    def _modules(self) -> nn.ModuleDict:
        layers = {name.replace(".", "/"): layer.adapters for name, layer in self.adapters.layers.items()}
        return nn.ModuleDict(layers)


def _fits(moments: Mapping[str, Tensor], p: Tensor) -> bool:
    """Whether an optimiser's moments fit a parameter. 8-bit moments are not checked: they belong to several parameters."""
    return "exp_avg_scale" in moments or all(
        moments[key].ndim == p.ndim and all(m in (1, n) for m, n in zip(moments[key].shape, p.shape, strict=True))
        for key in ("exp_avg", "exp_avg_sq")
        if key in moments
    )
