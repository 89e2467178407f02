"""The equations of the adapted layer in double precision, compared with dense matrices."""

import pytest
import torch
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Factors

D, K, R, N = 6, 5, 3, 4


class Toy(nn.Module):
    """Two layers with the names of a UNet: a self-attention query and a cross-attention key."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {
                "attn1": nn.ModuleDict({"to_q": nn.Linear(K, D)}),
                "attn2": nn.ModuleDict({"to_k": nn.Linear(K, D, bias=False)}),
            }
        )

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.blocks["attn1"]["to_q"](x), self.blocks["attn2"]["to_k"](text)  # type: ignore[index]


def toy(names: tuple[str, ...] = ("a", "b"), mergers: bool = False) -> tuple[Toy, Adapters]:
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Toy().double()
    adapters = Adapters.attach(model)
    for i, name in enumerate(names):
        made = {}
        for layer in adapters.layers:
            factors = Factors(
                torch.randn(R + i, K, generator=rng).double(), torch.randn(D, R + i, generator=rng).double(), 0.5 + i
            )
            if mergers:
                factors.columns = nn.Parameter(torch.rand(K, generator=rng).double())
                factors.channels = nn.Parameter(torch.rand(D, generator=rng).double())
                factors.register_buffer("mask", (torch.rand(D, generator=rng) > 0.5).double())
            made[layer] = factors
        adapters.add(name, made)
    return model, adapters


def dense(factors: Factors) -> Tensor:
    """scale · diag(g·mask) B A diag(m), the d×k matrix that the layer never forms."""
    w = factors.scale * factors.up @ factors.down
    if factors.columns is not None:
        w = w * factors.columns
    gate = factors.gate(factors.channels)
    return w if gate is None else gate[:, None] * w


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


@pytest.mark.parametrize("mergers", [False, True])
def test_factorised_equals_dense_forward_and_gradients(mergers: bool) -> None:
    model, adapters = toy(mergers=mergers)
    x, text = rand(2, N, K).requires_grad_(), rand(2, N, K)
    with adapters.activate([(Active("a", 0.7), Active("b", -1.2))] * 2):
        query, key = model(x, text)
        (query.square().sum() + key.square().sum()).backward()
    inputs = [p for name in "ab" for f in adapters.of(name).values() for _, p in f.parts()]
    got = [x.grad, *(p.grad for p in inputs)]
    expected = []
    x2 = x.detach().clone().requires_grad_()
    for layer, seen in zip(adapters.layers.values(), (x2, text), strict=True):
        w = layer.base.weight + 0.7 * dense(layer.adapters["a"]) - 1.2 * dense(layer.adapters["b"])  # type: ignore[arg-type]
        out = seen @ w.T
        expected.append(out if layer.bias is None else out + layer.bias)
    assert torch.allclose(query, expected[0], atol=1e-13) and torch.allclose(key, expected[1], atol=1e-13)
    wanted = torch.autograd.grad(torch.stack([out.square().sum() for out in expected]).sum(), [x2, *inputs])
    for one, other in zip(got, wanted, strict=True):
        assert one is not None and torch.allclose(one, other, atol=1e-12)


def test_own_prompt_enters_keys_and_values_only() -> None:
    """y = W0 x + Da(xa) + Db(xb) in cross-attention keys; in self-attention, all adapters get the same x."""
    model, adapters = toy()
    x, text, own_a, own_b = rand(2, N, K), rand(2, N, K), rand(N, K), 2 * rand(N, K)
    with adapters.activate([(Active("a", prompt="pa"), Active("b", prompt="pb"))] * 2, {"pa": own_a, "pb": own_b}):
        query, key = model(x, text)
    self_attention, cross_attention = adapters.layers.values()
    wa, wb = (dense(cross_attention.adapters[name]) for name in "ab")  # type: ignore[arg-type]
    assert torch.allclose(key, text @ cross_attention.weight.T + own_a @ wa.T + own_b @ wb.T, atol=1e-13)
    wa, wb = (dense(self_attention.adapters[name]) for name in "ab")  # type: ignore[arg-type]
    assert self_attention.bias is not None
    assert torch.allclose(query, x @ (self_attention.weight + wa + wb).T + self_attention.bias, atol=1e-13)


def test_rows_have_their_own_adapters() -> None:
    model, adapters = toy()
    x, text = rand(3, N, K), rand(3, N, K)
    rows: list[tuple[Active, ...]] = [(Active("a"),), (), (Active("a"), Active("b", 2.0))]
    with adapters.activate(rows):
        together = model(x, text)
    for i, row in enumerate(rows):
        with adapters.activate([row]):
            alone = model(x[i : i + 1], text[i : i + 1])
        for one, other in zip(together, alone, strict=True):
            assert torch.allclose(one[i : i + 1], other, atol=1e-14)


def test_stop_gradient_is_on_parameters_not_on_outputs() -> None:
    """Frozen parts get no gradient, but the gradient still flows through them to x."""
    model, adapters = toy(("a",))
    x = rand(1, N, K).requires_grad_()
    with adapters.activate([(Active("a", trains=frozenset(("up",))),)]):
        model(x, x)[0].square().sum().backward()
    factors = adapters.of("a")["blocks.attn1.to_q"]
    assert factors.down.grad is None and factors.up.grad is not None
    full = x.detach().clone().requires_grad_()
    with adapters.activate([(Active("a"),)]):
        model(full, full)[0].square().sum().backward()
    assert x.grad is not None and full.grad is not None and torch.equal(x.grad, full.grad)


def test_inactive_and_merger_off() -> None:
    model, adapters = toy(("a",), mergers=True)
    x = rand(1, N, K)
    plain = [layer.base(x) for layer in adapters.layers.values()]
    assert all(torch.equal(one, other) for one, other in zip(model(x, x), plain, strict=True))
    factors = adapters.of("a")["blocks.attn1.to_q"]
    with adapters.activate([(Active("a", merger=False),)]):
        out = model(x, x)[0]
    assert torch.allclose(out, plain[0] + factors.scale * x @ (factors.up @ factors.down).T, atol=1e-13)


def test_detached_model_is_the_original() -> None:
    torch.manual_seed(0)
    model = Toy()
    before = {name: (id(module), module) for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapters = Adapters.attach(model)
    adapters.new("a", 2, torch.Generator().manual_seed(0))
    adapters.detach()
    assert {name: (id(module), module) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_folded_factors_act_like_gated_ones() -> None:
    _, adapters = toy(("a",), mergers=True)
    for name, lora in adapters.folded("a").items():
        assert lora.alpha == len(lora.down)
        assert torch.allclose(lora.up @ lora.down, dense(adapters.of("a")[name]), atol=1e-14)


def test_a_fresh_adapter_changes_nothing_but_can_learn() -> None:
    model = Toy()
    x = torch.randn(1, N, K)
    before = model(x, x)[0]
    adapters = Adapters.attach(model)
    adapters.new("a", 2, torch.Generator().manual_seed(0))
    with adapters.activate([(Active("a"),)]):
        out = model(x, x)[0]
        out.square().sum().backward()
    assert torch.equal(out, before)
    assert adapters.of("a")["blocks.attn1.to_q"].up.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_bad_ranks_shapes_and_names_are_told() -> None:
    _, adapters = toy()
    with pytest.raises(UsageError, match="rank 6 does not fit"):
        adapters.new("c", 6, torch.Generator())
    with pytest.raises(UsageError, match="wrong shapes"):
        adapters.add("c", {"blocks.attn1.to_q": Factors(torch.zeros(2, K + 1), torch.zeros(D, 2))})
    with pytest.raises(UsageError, match="no adapter 'zebra'"), adapters.activate([(Active("zebra"),)]):
        pass
    with pytest.raises(UsageError, match="no linear layer"):
        Adapters.attach(Toy(), "nothing")
