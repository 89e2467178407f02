"""QR-LoRA equals the paper's residual form, and only the upper triangle is trained."""

from pathlib import Path

import pytest
import torch
from checkpoints import TO_Q
from test_graphs import case
from test_many import start

from unbraid.bases.base import Base
from unbraid.common.errors import UsageError
from unbraid.common.progress import tracked, watched
from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta
from unbraid.core.train import train
from unbraid.files.lora_file import write
from unbraid.files.merge import merge
from unbraid.files.report import interference
from unbraid.methods import bases
from unbraid.methods.bases import basis
from unbraid.methods.qrlora import squared_cosine
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


def test_a_large_layer_is_projected_and_a_basis_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random projection finds the subspace; the same every time; and a changed weight gets another basis."""
    rng = torch.Generator().manual_seed(0)
    # singular values that fall as those of a trained layer
    left, right = (torch.linalg.qr(torch.randn(96, 96, generator=rng).double()).Q for _ in range(2))
    weight = (left * torch.arange(1, 97).double() ** -0.5) @ right.T
    exact = bases.basis(weight, 8)
    monkeypatch.setattr(bases, "LARGE", 64)
    other = weight.clone()
    assert torch.equal(bases.basis(weight, 8), exact), "known already"
    found = bases.basis(other, 8)
    assert not torch.equal(found, exact) and torch.equal(bases.basis(weight.clone(), 8), found)
    best, mine = ((one.T @ weight).square().sum() for one in (exact, found))
    assert 0.9999 * best < mine <= best * (1 + 1e-12)
    assert (found.T @ exact).abs().diagonal().min() > 0.99
    assert torch.allclose(found.T @ found, torch.eye(8).double(), atol=1e-12)
    other.mul_(-1.0)
    assert not torch.equal(bases.basis(other, 8), found)
    assert bases.basis(other, 4).shape == (96, 4) and bases.basis(other.to("meta"), 4).is_meta


def test_two_of_one_base_are_added_at_their_rank(tmp_path: Path) -> None:
    """In double precision: the sum is exact, and the interference is that of ΔR alone."""
    rng = torch.Generator().manual_seed(0)
    up = bases.basis(torch.randn(24, 16, generator=rng).double(), 4)
    loras = [Lora(torch.randn(4, 16, generator=rng).double().triu(), up, 4.0) for _ in range(2)]
    (merged,) = merge([{TO_Q: one} for one in loras], [0.7, 0.4])
    assert merged.lora.down.shape == (4, 16) and torch.equal(merged.lora.up, up)
    wanted = 0.7 * delta(loras[0]) + 0.4 * delta(loras[1])
    assert torch.allclose(delta(merged.lora), wanted, rtol=1e-12, atol=1e-14)
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file, one in zip(files, loras, strict=True):
        write(file, {TO_Q: one}, family="sdxl")
    (found,) = interference(*files)
    cosine = torch.cosine_similarity(loras[0].down.flatten(), loras[1].down.flatten(), 0)
    assert found.cosine == pytest.approx(float(cosine), rel=1e-3)  # files are in half precision


def test_a_split_shares_the_basis_and_its_penalty_is_exact(v_model: Base) -> None:
    v_model.denoiser.double()
    run_data, recipe, state = start(v_model, case("qr-split", content_alone=0.5)[0], 0)()
    seen: list[tuple[int, int]] = []
    with watched(lambda what, i, of: seen.append((i, of))):
        assert list(tracked("ab", "x")) == ["a", "b"] and seen == [(0, 2), (1, 2)]
    list(train(run_data, recipe, state))
    state.adapters.detach()
    both, wanted = [state.adapters.folded(role) for role in ("content", "style")], []
    for name, content in both[0].items():
        style = both[1][name]
        assert torch.equal(content.up, style.up) and torch.equal(style.down, style.down.triu())
        wanted.append(float(torch.cosine_similarity(delta(content).flatten(), delta(style).flatten(), 0)) ** 2)
    assert squared_cosine(state.adapters).item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)


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
