"""Stacked factors compared with the formula, row by row with dense matrices in double precision: outputs and gradients."""

import pytest
import torch
from torch import Tensor, nn

from unbraid.core.adapters import MOST_ROWS, Adapters
from unbraid.core.lora import Active, Factors, Part
from unbraid.core.optim import AdamW

D, K, N, B = 6, 5, 3, 4
UP: frozenset[Part] = frozenset({"up"})
A, S = Active("a", 0.7), Active("s", -1.2)
ACTIVITIES: dict[str, list[tuple[Active, ...]]] = {
    "all alike": [(A, S)] * B,
    "each its own": [(A,), (S,), (S, A), (Active("a", 2.0),)],
    "two shares": [(A,), (A,), (Active("a", 0.7, trains=UP), S), (Active("a", 0.7, trains=UP), S)],
    "some rows without": [(), (A,), (S,), ()],
    "a hole": [(A,), (), (A, S), (A,)],
    "own prompts": [(Active("a", prompt="p"), Active("s", prompt="q"))] * B,
    "own and the row's": [(Active("a", prompt="p"), S), (A, Active("s", prompt="q")), (), (Active("a", prompt="q"),)],
    "mergers off or still": [(Active("a", merger=False),), (A, Active("s", trains=frozenset({"merger"}))), (S,), (A,)],
    "nothing trains": [(Active("a", trains=frozenset()), S)] * B,
}


class Block(nn.Module):
    """Two self-attention layers of one shape and one of another, and the two of cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(K, D), "to_k": nn.Linear(K, D), "to_v": nn.Linear(K, D + 2)})
        self.attn2 = nn.ModuleDict({"to_k": nn.Linear(K, D, bias=False), "to_v": nn.Linear(K, D, bias=False)})

    def forward(self, x: Tensor, text: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.attn1.values()] + [layer(text) for layer in self.attn2.values()]


def model(ranks: tuple[int, int], mergers: bool) -> tuple[nn.Module, Adapters]:
    torch.manual_seed(0)
    whole = nn.Module()
    whole.add_module("block", Block())
    whole.double().requires_grad_(False)
    adapters = Adapters.attach(whole)
    for name, rank in zip("as", ranks, strict=True):
        made = {}
        for i, (layer, one) in enumerate(adapters.layers.items()):
            d, k = one.base.weight.shape
            factors = Factors(torch.randn(rank, k).double(), torch.randn(d, rank).double(), 0.5 + rank)
            if mergers:
                factors.columns, factors.ranks = (nn.Parameter(torch.rand(size).double()) for size in (k, rank))
                factors.channels = nn.Parameter(torch.rand(1 if i == 0 else d).double())
                factors.register_buffer("mask", (torch.rand(d) > 0.5).double())
            made[layer] = factors
        adapters.add(name, made)
    return whole, adapters


def formula(
    layer: nn.Module, adapters: dict[str, Factors], seen: Tensor, row: tuple[Active, ...], own: dict[str, Tensor]
) -> Tensor:
    """y = W0 x + Σ scale · g ⊙ B (n ⊙ A (m ⊙ x_a)) for one row, with d×k matrices."""
    y = layer(seen)
    for active in row:
        factors = adapters[active.adapter]

        def part(name: Part, value: Tensor | None, active: Active = active) -> Tensor | None:
            return value if value is None or name in active.trains else value.detach()

        down, up = part("down", factors.down), part("up", factors.up)
        m, n, g = (part("merger", one) for one in (factors.columns, factors.ranks, factors.channels))
        assert down is not None and up is not None
        if active.merger:
            down = down if m is None or n is None else n[:, None] * down * m
            up = up if g is None or factors.mask is None else (g * factors.mask)[:, None] * up
        x = own.get(active.prompt or "", seen)
        y = y + active.scale * factors.scale * x @ (up @ down).T
    return y


@pytest.mark.parametrize("mergers", [False, True])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
@pytest.mark.parametrize("name", ACTIVITIES)
def test_stacked_equals_the_formula(name: str, ranks: tuple[int, int], mergers: bool) -> None:
    whole, adapters = model(ranks, mergers)
    rows, x = ACTIVITIES[name], torch.randn(B, N, K).double().requires_grad_()
    text, prompts = torch.randn(B, N, K).double(), {one: torch.randn(N, K).double() for one in "pq"}
    parameters = [p for one in "as" for factors in adapters.of(one).values() for _, p in factors.parts()]
    with adapters.activate(rows, prompts):
        outs = whole.block(x, text)  # type: ignore[operator]
        loss = sum((out * torch.arange(out.numel()).view(out.shape).double().sin()).sum() for out in outs)
        got = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)  # type: ignore[arg-type]
    wanted = []
    for layer_name, layer in adapters.layers.items():
        cross, inside = ".attn2." in layer_name, {one: adapters.of(one)[layer_name] for one in "as"}
        seen, own = (text, prompts) if cross else (x, {})
        wanted.append(torch.stack([formula(layer.base, inside, seen[i], row, own) for i, row in enumerate(rows)]))
    loss = sum((out * torch.arange(out.numel()).view(out.shape).double().sin()).sum() for out in wanted)
    expected = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)  # type: ignore[arg-type]
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(outs, wanted, strict=True))
    for one, other in zip(got, expected, strict=True):
        zero = torch.zeros(())
        assert torch.allclose(zero if one is None else one, zero if other is None else other, atol=1e-12)
    assert any(one is not None and bool(one.any()) for one in got[1:])


def test_an_adapter_that_not_every_layer_has() -> None:
    whole, adapters = model((2, 2), False)
    gone = "block.attn1.to_k"
    del adapters.layers[gone].adapters["s"]
    x = torch.randn(1, N, K).double()
    with adapters.activate([(A, S)]):
        _, key, *_ = whole.block(x, x)  # type: ignore[operator]
    layer = adapters.layers[gone]
    assert torch.allclose(key[0], formula(layer.base, {"a": adapters.of("a")[gone]}, x[0], (A,), {}), atol=1e-12)


def test_the_base_looks_at_a_prompt_once() -> None:
    """W0 of a prompt is computed again only for another prompt, or one that was changed in place."""
    _, adapters = model((2, 2), False)
    calls = []
    layer = adapters.layers["block.attn2.to_k"]
    layer.base.register_forward_hook(lambda *_: calls.append(1))
    text = torch.randn(2, N, K).double()

    def compute(text: Tensor) -> Tensor:
        with adapters.activate([(A,)] * len(text)):
            return layer(text)

    first = compute(text)
    assert torch.equal(compute(text), first) and len(calls) == 1
    other = compute(text.clone() + 1)
    assert len(calls) == 2 and not torch.equal(other, first)
    text += 1
    assert torch.equal(compute(text), other) and len(calls) == 3
    for _ in range(2):
        compute(text[:1].expand(MOST_ROWS + 1, -1, -1))  # too many rows to be cached
    assert len(calls) == 5
    for _ in range(20):
        compute(torch.randn(1, N, K).double())
    assert len(layer._known) <= 8
    queries = adapters.layers["block.attn1.to_q"]
    queries(text)
    assert not queries._known, "what is no prompt is never kept"


def test_adamw_is_torchs_bit_for_bit() -> None:
    rng = torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(3, n)) for n in (2, 5)] for _ in range(2))
    groups = [
        [{"params": [p], "lr": 0.1 / (i + 1), "weight_decay": 0.1 * i} for i, p in enumerate(ps)]
        for ps in (ours, theirs)
    ]
    one, other = AdamW(groups[0]), torch.optim.AdamW(groups[1], fused=True)
    for i in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        if i == 2:
            ours[0].grad = theirs[0].grad = None  # a parameter without a gradient in this step
        one.step()
        other.step()
        one.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    states = [[value["step"] for value in optimizer.state_dict()["state"].values()] for optimizer in (one, other)]
    assert states[0] == states[1] == [3, 4]
