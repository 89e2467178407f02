"""QR-LoRA equals the paper's residual form, and only the upper triangle is trained."""

from pathlib import Path

import pytest
import torch
from test_graphs import case
from test_many import start

from unbraid.bases.base import Base
from unbraid.common.errors import UsageError
from unbraid.core.train import train
from unbraid.methods.qrlora import basis
from unbraid.runs.api import learn_job
from unbraid.runs.run import run


def test_it_is_the_papers_form() -> None:
    """(W − QR) x + Q (R + ΔR) x = W x + Q ΔR x, where QR is the best approximation of W of that rank (by SVD)."""
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 16, generator=rng), torch.randn(16, 5, generator=rng)
    q = basis(weight, 4)
    assert torch.allclose(q.T @ q, torch.eye(4), atol=1e-5)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    core = (u[:, :4] * s[:4]) @ vt[:4]
    r = q.T @ core
    assert (
        torch.allclose(q @ r, core, atol=1e-4) and torch.allclose(r, r.triu(), atol=1e-4) and (r.diagonal() > 0).all()
    )
    change = torch.randn(4, 16, generator=rng).triu()
    assert torch.allclose((weight - core) @ x + q @ (r + change) @ x, weight @ x + q @ change @ x, atol=1e-3)


def test_only_the_triangle_trains(v_model: Base) -> None:
    run_data, recipe, state = start(v_model, case("qr-lora", weight_decay=0.1)[0], 0)()
    before = {name: one.up.clone() for name, one in state.adapters.of("lora").items()}
    list(train(run_data, recipe, state))
    state.adapters.detach()
    for name, one in state.adapters.of("lora").items():
        assert torch.equal(one.up, before[name]) and one.down.abs().max() > 0
        assert torch.equal(one.down, one.down.triu()), name


def test_what_it_cannot_do(v_base: Path, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        list(run(learn_job(picture, prompt="a cat", method="qr-lora", base=str(v_base), rank=999, out=tmp_path / "a")))
