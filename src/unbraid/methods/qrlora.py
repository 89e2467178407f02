"""QR-LoRA: a LoRA whose `up` is a frozen orthonormal basis of the layer's strongest outputs, and of whose `down` only an
upper triangle trains (arXiv 2507.04599).

U S Vᵀ is the best approximation of W with rank r, and U S Vᵀ = Q R with Q [d, r] orthonormal. The paper replaces W by
(W − QR) + Q (R + ΔR) and trains ΔR, which is upper triangular and zero at the start. That equals an ordinary LoRA on W with
up = Q and down = ΔR. Q depends only on the base and the rank, so all LoRAs of one base share it, and two of them are added
by adding their `down`.
"""

from typing import Literal

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.adapters import AdaptedLinear, Adapters
from unbraid.core.lora import Active, Branch, Factors
from unbraid.core.optim import Rate, Rates
from unbraid.core.recipe import Hooks, Recipe
from unbraid.methods.entry import Blocks, Entry, Input, Inputs, Output
from unbraid.methods.losses import with_x0_loss


def qrlora(
    blocks: Blocks,
    *,
    rank: int = 64,
    steps: int = 1000,
    lr: float = 1e-4,
    weight_decay: float = 1e-4,
    targets: Literal["attention", "transformers"] = "attention",
) -> tuple[Recipe, ...]:
    """Learn one concept or style with half the trained parameters of a LoRA.

    rank: of the adapter, and of the basis. steps: optimiser steps. lr: AdamW's learning rate. weight_decay: AdamW's.
    targets: which layers train: attention's projections, or all linear layers of the transformers.
    """
    del blocks

    def prepare(adapters: Adapters, rng: torch.Generator) -> None:
        del rng
        if adapters.names:
            raise UsageError("qr-lora starts from its own basis, not from a LoRA", "--from", "Leave it out.")
        adapters.add("lora", {name: _fresh(name, layer, rank) for name, layer in adapters.layers.items()})

    def after_backward(adapters: Adapters, step: int) -> None:
        del step
        for factors in adapters.pieces_of("lora"):
            assert factors.down.grad is not None
            factors.down.grad.triu_()  # below the diagonal, `down` is zero at the start and stays so

    branch = Branch("image", "both", (Active("lora", trains=frozenset({"down"})),))
    rates: Rates = {("lora", "down"): Rate(lr, weight_decay)}
    return (
        Recipe(
            prepare,
            lambda step: (branch,),
            rates,
            steps,
            hooks=Hooks(after_backward=after_backward),
            targets=targets,
        ),
    )


def _fresh(name: str, layer: AdaptedLinear, rank: int) -> Factors:
    """The factors of one layer before training: up = Q and down = 0. Raises UsageError if the rank is too high."""
    weight = layer.base.weight.detach().float()
    if not 1 <= rank <= min(weight.shape):
        raise UsageError(f"rank {rank} does not fit {name}", "rank", f"Choose 1 to {min(weight.shape)}.")
    return Factors(weight.new_zeros(rank, weight.shape[1]), basis(weight, rank))


def basis(weight: Tensor, rank: int) -> Tensor:
    """Q of the QR decomposition of the best approximation of W with this rank: `[d, rank]`, orthonormal, in the dtype of
    `weight`. Its signs are chosen so that the diagonal of R is positive. The first `rank` columns of U Uᵀ W determine Q; U
    comes from an eigendecomposition of W Wᵀ, which is faster than an SVD of W."""
    exact = (weight if weight.is_meta else weight.cpu()).double()
    strongest = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:]
    q, r = torch.linalg.qr(strongest @ (strongest.T @ exact[:, :rank]))
    return (q * r.diagonal().sign()).to(weight)


ENTRIES = (
    Entry(
        "qr-lora",
        "learn",
        with_x0_loss(qrlora),
        {"both": "{prompt}"},
        lambda settings: {"lora": Output(("lora",), "both")},
        "QR-LoRA",
        "arXiv 2507.04599",
        Inputs((Input("image", "pictures"),)),
    ),
)
