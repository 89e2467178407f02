"""Merging: exact methods are exact, others equal their dense definitions, and peft's results where it has the method."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta, norm, rescaled, svd, truncate
from unbraid.files.merge import Size, merge

NAMES = ("unet.a", "unet.b", "unet.c")
D, K = 9, 7


def factors(seed: int, rank: int, alpha: float, dtype: torch.dtype = torch.float64) -> Lora:
    rng = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, K, generator=rng, dtype=torch.float64)
    return Lora(down.to(dtype), torch.randn(D, rank, generator=rng, dtype=torch.float64).to(dtype), alpha)


def dense(one: Lora | None) -> Tensor:
    return torch.zeros(D, K, dtype=torch.float64) if one is None else delta(one).double()


def merged(
    loras: list[dict[str, Lora]],
    weights: list[float],
    method: str = "concat",
    size: Size | None = None,
    **kw: float | int,
) -> dict[str, Lora]:
    return {one.name: one.lora for one in merge(loras, weights, method, size, None, **kw)}


def trim(full: Tensor, density: float) -> Tensor:
    return merge_utils.prune(full, density, "magnitude") if density < 1 else full


def ties(changes: list[Tensor], weights: list[float], density: float) -> Tensor:
    """The three steps of the paper."""
    kept = torch.stack([trim(one, density) * w for one, w in zip(changes, weights, strict=True)])
    agree = (torch.sign(kept) == torch.sign(kept.sum(0))) & (kept != 0)
    return torch.where(agree.any(0), (kept * agree).sum(0) / agree.sum(0).clamp_min(1), 0.0)


loras = st.dictionaries(
    st.sampled_from(NAMES),
    st.builds(factors, st.integers(0, 10**6), st.integers(1, 10), st.floats(0.1, 20), st.sampled_from([torch.float64])),
    min_size=1,
)
weight = st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)


@given(st.lists(st.tuples(loras, weight), min_size=1, max_size=4))
@settings(max_examples=80, deadline=None)
def test_concat_is_the_weighted_sum(given_: list[tuple[dict[str, Lora], float]]) -> None:
    out = merged([one for one, _ in given_], [w for _, w in given_])
    assert set(out) == {name for one, _ in given_ for name in one}
    assert len({one.alpha for one in out.values()}) == 1
    for name, one in out.items():
        want = torch.stack([w * dense(lora.get(name)) for lora, w in given_]).sum(0)
        size = sum(abs(w) * float(dense(lora.get(name)).norm()) for lora, w in given_)
        assert float((dense(one) - want).norm()) <= 1e-13 * size


def test_concat_in_fp16_rounds_once_and_never_down() -> None:
    a, b = ({"unet.a": factors(i, 4, 4.0, torch.float16)} for i in (1, 2))
    plain = merged([a, b], [1.0, 1.0])["unet.a"]
    assert plain.down.dtype == torch.float16 and torch.equal(
        plain.down, torch.cat([a["unet.a"].down, b["unet.a"].down])
    )
    assert torch.equal(dense(plain), dense(Lora(plain.down, torch.cat([a["unet.a"].up, b["unet.a"].up], 1), 8.0)))
    scaled = merged([a, b], [0.7, -0.4])["unet.a"]
    want = 0.7 * dense(a["unet.a"]) - 0.4 * dense(b["unet.a"])
    assert float((dense(scaled) - want).norm() / want.norm()) < 5e-4


def test_peft_agrees_on_cat() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(K, D)),
        LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False),
        "first",
    )
    model.add_adapter("second", LoraConfig(r=5, lora_alpha=5, target_modules=["0"], init_lora_weights=False))
    model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination_type="cat")  # type: ignore[operator]
    layer: Any = model.base_model.model[0]  # type: ignore[index]
    ours = [
        {"unet.a": Lora(layer.lora_A[n].weight.data, layer.lora_B[n].weight.data, alpha)}
        for n, alpha in (("first", 6.0), ("second", 5.0))
    ]
    got = dense(merged(ours, [0.7, 0.4])["unet.a"])
    assert float((got - layer.get_delta_weight("both").double()).abs().max()) < 1e-6


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_truncation_is_the_dense_svd(seed: int, rank: int, wanted: int) -> None:
    one = factors(seed, rank, -3.0)
    u, s, vt = torch.linalg.svd(dense(one), full_matrices=False)
    ours, kept = truncate(one, wanted)
    want = u[:, :wanted] @ torch.diag(s[:wanted]) @ vt[:wanted]
    assert float((dense(ours) - want).norm()) <= 1e-12 * float(s[0])
    assert kept == pytest.approx(float((s[:wanted] ** 2).sum() / (s**2).sum()))
    assert float((svd(one)[1][: len(s)] - s[: len(svd(one)[1])]).abs().max()) < 1e-12 * float(s[0])
    assert norm(one) == pytest.approx(float(dense(one).norm()))


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_is_kept_with_as_few_as_possible(energy: float) -> None:
    ours, kept = truncate(factors(3, 6, 2.0), energy=energy)
    assert kept >= energy - 1e-9
    assert len(ours.down) == 1 or truncate(factors(3, 6, 2.0), len(ours.down) - 1)[1] < energy


def test_a_merge_can_be_truncated() -> None:
    a, b = {"unet.a": factors(1, 3, 3.0)}, {"unet.a": factors(2, 4, 2.0)}
    u, s, vt = torch.linalg.svd(dense(a["unet.a"]) - 0.5 * dense(b["unet.a"]), full_matrices=False)
    out = merged([a, b], [1.0, -0.5], size=Size(rank=2))["unet.a"]
    assert len(out.down) == 2 and float((dense(out) - u[:, :2] @ torch.diag(s[:2]) @ vt[:2]).abs().max()) < 1e-12


@given(st.integers(0, 10**6), st.floats(0.1, 1), weight, weight)
@settings(max_examples=20, deadline=None)
def test_dense_methods_equal_their_definitions(seed: int, density: float, first: float, second: float) -> None:
    a, b = factors(seed, 3, 2.0), factors(seed + 1, 2, 5.0)
    full = Size(rank=min(D, K))
    made = {
        m: dense(merged([{"unet.a": a}, {"unet.a": b}], [first, second], m, full, density=density)["unet.a"])
        for m in ("ties", "prune")
    }
    changes, weights = [dense(a), dense(b)], [first, second]
    keep = max(round(density * D * K), 1) / (D * K) + 1e-9
    assert float((made["ties"] - ties(changes, weights, keep)).abs().max()) < 1e-10
    want = first * trim(changes[0], keep) + second * trim(changes[1], keep)
    assert float((made["prune"] - want).abs().max()) < 1e-10


def test_peft_agrees_on_ties() -> None:
    changes = [dense(factors(i, 3, 2.0)) for i in (1, 2, 3)]
    parts = [{"unet.a": factors(i, 3, 2.0)} for i in (1, 2, 3)]
    ours = merged(parts, [1.0] * 3, "ties", Size(rank=K), density=30 / (D * K))["unet.a"]
    assert float((dense(ours) - merge_utils.ties(changes, torch.ones(3), 30 / (D * K) + 1e-9)).abs().max()) < 1e-10


def test_dare_is_seeded_and_unbiased() -> None:
    a = {"unet.a": factors(1, 3, 3.0)}
    full = Size(rank=K)
    once, again = (dense(merged([a], [2.0], "dare", full, density=0.4, seed=5)["unet.a"]) for _ in range(2))
    assert torch.equal(once, again)
    kept = once.abs() > 1e-9
    assert torch.allclose(once[kept], (2.0 / 0.4 * dense(a["unet.a"]))[kept]) and 0 < int(kept.sum()) < D * K
    mean = torch.stack(
        [dense(merged([a], [1.0], "dare", full, density=0.4, seed=i)["unet.a"]) for i in range(400)]
    ).mean(0)
    assert float((mean - dense(a["unet.a"])).norm() / dense(a["unet.a"]).norm()) < 0.1


@given(st.integers(0, 10**6), st.floats(0.1, 1), weight, weight)
@settings(max_examples=20, deadline=None)
def test_knots_is_ties_in_the_shared_basis(seed: int, density: float, first: float, second: float) -> None:
    a, b = factors(seed, 2, 2.0), factors(seed + 1, 3, 5.0)
    u, _, _ = torch.linalg.svd(torch.cat([dense(a), dense(b)], 1), full_matrices=False)
    basis = u[:, :5]
    keep = max(round(density * 5 * K), 1) / (5 * K) + 1e-9
    kept = torch.stack([trim(basis.T @ dense(one), keep) * w for one, w in ((a, first), (b, second))])
    agrees = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
    want = basis @ ((kept * agrees).sum(0) / agrees.sum(0).clamp_min(1))
    out = merged([{"unet.a": a}, {"unet.a": b}], [first, second], "knots", density=density)["unet.a"]
    assert len(out.down) == 5 and float((dense(out) - want).abs().max()) < 1e-10


@given(st.integers(0, 10**6), st.floats(0, 100), weight, weight)
@settings(max_examples=20, deadline=None)
def test_np_lora_is_its_formula(seed: int, mu: float, first: float, second: float) -> None:
    content, style = factors(seed, 3, 2.0), factors(seed + 1, 2, 5.0)
    q = torch.linalg.qr(style.down.T)[0]
    want = second * dense(style) + first * dense(content) @ (torch.eye(K).double() - mu / (1 + mu) * q @ q.T)
    out = merged([{"unet.a": content}, {"unet.a": style}], [first, second], "np-lora", mu=mu)["unet.a"]
    assert len(out.down) == 5 and float((dense(out) - want).abs().max()) < 1e-10


def test_blocks_take_content_and_style() -> None:
    places = ("up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "mid_block.attentions.0")
    content, style = ({f"unet.{p}.proj_in": factors(10 * n + i, 2, 2.0) for i, p in enumerate(places)} for n in (1, 2))
    out = merged([content, style], [1.0, 0.5], "blocks")
    first, second = (f"unet.{p}.proj_in" for p in places[:2])
    assert set(out) == {first, second}
    assert torch.allclose(dense(out[first]), dense(content[first])) and torch.allclose(
        dense(out[second]), 0.5 * dense(style[second])
    )


def test_truncating_ties_is_close_to_the_best() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (Lora(torch.randn(4, 200, generator=rng), torch.randn(150, 4, generator=rng), 4.0) for _ in range(2))
    full = merged([{"unet.a": a}, {"unet.a": b}], [1.0, 1.0], "ties", Size(rank=150))["unet.a"]
    best = truncate(full, 8)[1]
    small = next(merge([{"unet.a": a}, {"unet.a": b}], [1.0, 1.0], "ties", Size(rank=8)))
    assert small.kept == pytest.approx(best, rel=1e-3)


def test_a_weight_of_zero_is_nothing() -> None:
    a, b = {"unet.a": factors(1, 2, 1.0)}, {"unet.a": factors(2, 2, 1.0), "unet.b": factors(3, 2, 1.0)}
    out = merged([a, b], [1.0, 0.0])
    assert set(out) == {"unet.a"} and len(out["unet.a"].down) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda a: merged([a], [1.0], "tis"),
        lambda a: merged([a], [1.0], "ties", densty=0.5),
        lambda a: merged([a], [1.0], "ties", density=0.0),
        lambda a: merged([a], [1.0], size=Size(rank=0)),
        lambda a: merged([a], [1.0], size=Size(energy=1.5)),
        lambda a: merged([a], [1.0, 2.0]),
        lambda a: merged([a], [0.0]),
        lambda a: merged([a], [float("inf")]),
        lambda a: merged([a, {"unet.a": Lora(torch.ones(1, K + 1), torch.ones(D, 1), 1.0)}], [1.0, 1.0]),
    ],
)
def test_wrong_merges_are_refused(call) -> None:
    with pytest.raises(UsageError):
        call({"unet.a": factors(1, 2, 1.0)})


def test_rescaling_keeps_the_change() -> None:
    one = factors(1, 3, 2.0)
    assert torch.allclose(dense(rescaled(one, 7.0, None, "x")), dense(one), atol=1e-13)
    assert rescaled(one, 4.0, None, "x").up.dtype == torch.float64
