"""The optimisers: AdamW, with a learning rate for each part of each adapter, and a Riemannian Adam."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Factors, Part


@dataclass(frozen=True)
class Rate:
    """Learning rate and weight decay of one part of one adapter."""

    lr: float
    weight_decay: float = 0.0


Rates = Mapping[tuple[str, Part], Rate]


class AdamW(torch.optim.AdamW):
    """Bit for bit the same as torch's fused AdamW, without the checks that torch repeats at every step. For the
    hundreds of small tensors of an adapter, those checks take longer than the arithmetic: 4.8 of 6.5 ms for 480
    tensors (docs/LOG.md)."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        super().__init__([dict(group) for group in groups], fused=True)
        self.register_load_state_dict_post_hook(_in_the_parameters_order)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in parameters]
            for p, state in zip(parameters, states, strict=True):
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if not parameters:
                continue
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def adamw(adapters: Adapters, rates: Rates) -> AdamW:
    """AdamW (betas 0.9, 0.999) with one parameter group per adapter and part, from `groups`."""
    return AdamW(groups(adapters, rates))


def _in_the_parameters_order(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the memory layout of their parameters. The fused kernel reads both in the order of memory,
    and saving makes the moments contiguous."""
    for p, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.empty_like(p, requires_grad=False).copy_(state[key])


def groups(adapters: Adapters, rates: Rates) -> list[dict[str, Any]]:
    """One parameter group per (adapter, part). Parts without a rate are frozen: no gradient, weight decay or moments.
    Raises UsageError if nothing would be trained."""
    out = []
    for adapter in adapters.names:
        parts: dict[Part, list[torch.nn.Parameter]] = {}
        for factors in adapters.pieces_of(adapter):
            for part, parameter in factors.parts():
                parameter.requires_grad_((adapter, part) in rates)
                parts.setdefault(part, []).append(parameter)
        for part, parameters in parts.items():
            rate = rates.get((adapter, part))
            if rate is not None:
                out.append({"params": parameters, "lr": rate.lr, "weight_decay": rate.weight_decay})
    if not out:
        raise UsageError("nothing would be trained", "rates", "Give at least one part of one adapter a rate.")
    return out


class Riemannian(torch.optim.Optimizer):
    """Adam in the metric of ΔW = B A (Zhang & Pilanci, arXiv 2402.02347), with one second moment per matrix (arXiv
    1810.00760).

    The gradients are G_B (A Aᵀ + δ)⁻¹ and (Bᵀ B + δ)⁻¹ G_A, with δ relative to the mean of the diagonal. The size of a
    step is measured by the change of ΔW. So it does not depend on how ΔW is factored: (c B, A / c) gives the same step
    as (B, A). `lr` is the root mean square change of the entries of ΔW by each factor.
    """

    def __init__(self, factors: Sequence[Factors], lr: float, delta: float, betas: tuple[float, float] = (0.9, 0.999)):
        self.factors, self.delta, self.betas = factors, delta, betas
        super().__init__([{"params": [part for one in factors for part in (one.down, one.up)], "lr": lr}], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        del closure
        lr = self.param_groups[0]["lr"]
        for one in self.factors:
            if one.down.grad is None or one.up.grad is None:
                continue
            down, up = one.plain()
            solved = (
                torch.cholesky_solve(one.down.grad, self._gram(up.mT @ up)),
                torch.cholesky_solve(one.up.grad.mT, self._gram(down @ down.mT)).mT,
            )
            for_down, for_up = one.fixed.free(*solved) if one.fixed else solved
            self._move(one.down, for_down, up @ for_down, lr)
            self._move(one.up, for_up, for_up @ down, lr)

    def _gram(self, gram: Tensor) -> Tensor:
        """The Cholesky factor of Gram matrices `[*layers, r, r]` with δ added to the diagonal. For a Gram matrix of
        zeros (B = 0 at the start) it is the unit matrix."""
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        damped = gram + torch.where(mean > 0, self.delta * mean, 1) * unit
        return torch.linalg.cholesky_ex(damped).L  # `cholesky` waits for the device to check for errors

    def _move(self, p: Tensor, gradient: Tensor, change: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(p)
            state["exp_avg_sq"] = p.new_zeros(*p.shape[:-2], 1, 1)
        state["step"] += 1
        first, second = self.betas
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].lerp_(change.square().mean((-2, -1), keepdim=True), 1 - second)
        count = float(state["step"])
        size = (state["exp_avg_sq"] / (1 - second**count)).sqrt().clamp_min(1e-30)
        p.sub_(state["exp_avg"] / (1 - first**count) / size, alpha=lr)


def riemannian(adapters: Adapters, rates: Rates, delta: float = 1e-2) -> Riemannian:
    """`Riemannian` for both factors of the only adapter that has rates. The learning rate is its rate for `up`."""
    ((name, rate),) = {(adapter, rates[adapter, "up"]) for adapter, _ in rates}
    groups(adapters, rates)
    return Riemannian(adapters.pieces_of(name), rate.lr, delta)
