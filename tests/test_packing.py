"""Packed factors share memory, gradients and state with the stacks; factors of different forms are not packed together."""

import torch
from test_stacked import K, N, model  # two self-attention layers of one shape, one of another, two of cross-attention

from unbraid.core.lora import ALL, Active
from unbraid.core.optim import Rate, Rates, adamw, groups
from unbraid.core.packing import stack

Q, KEY, VALUE = (f"block.attn1.to_{one}" for one in "qkv")


def test_layers_of_one_form_are_one_piece() -> None:
    _, adapters = model((2, 3), False)
    assert len(adapters.pieces()) == 5, "nothing is packed: a piece is a layer"
    adapters.pack()
    shapes = sorted(tuple(some["a"].up.shape) for some in adapters.pieces())
    assert shapes == [(1, 8, 2), (2, 6, 2), (2, 6, 2)], "cross-attention, which can read prompts of its own, is apart"
    rates: Rates = {("a", "down"): Rate(1e-2), ("a", "up"): Rate(1e-2)}
    (down, up) = groups(adapters, rates)
    assert len(down["params"]) == len(up["params"]) == 3
    assert all(p.requires_grad for p in down["params"]) and not any(s.up.requires_grad for s in adapters.pieces_of("s"))


def test_what_is_written_here_is_there() -> None:
    _, adapters = model((2, 2), True)
    before = {name: one.folded() for name, one in adapters.of("a").items()}
    adapters.pack()
    for name, one in adapters.of("a").items():
        found, wanted = one.folded(), before[name]
        assert torch.equal(found.down, wanted.down) and torch.equal(found.up, wanted.up)
    query, place = adapters.of("a")[KEY], adapters.of("a")[KEY].place
    assert place and place.index in (0, 1) and not query.up.requires_grad
    with torch.no_grad():
        place.stack.up.add_(1)
        query.channels.zero_()  # type: ignore[union-attr]
    assert (
        torch.equal(query.up, place.stack.up[place.index]) and query.mask is not None and place.stack.mask is not None
    )
    assert not place.stack.channels[place.index].any()  # type: ignore[index]
    query.mask.fill_(7)
    assert (place.stack.mask[place.index] == 7).all()
    state = {name: layer.adapters.state_dict() for name, layer in adapters.layers.items()}
    state[KEY]["a.up"] = torch.full_like(query.up, 3.0)
    adapters.layers[KEY].adapters.load_state_dict(state[KEY])
    assert (place.stack.up[place.index] == 3).all(), "a state that is loaded gets there too"


def test_training_is_the_same() -> None:
    """AdamW on stacks gives the same as AdamW on the layers' own factors with the same gradients."""
    whole, adapters = model((2, 2), True)
    for one in ("a", "s"):
        for factors in adapters.of(one).values():
            assert factors.mask is not None
            factors.mask.fill_(1)  # so that everything is trained
    apart = {
        (n, one): torch.nn.ParameterList(p.detach().clone() for _, p in f.parts())
        for n in "as"
        for one, f in adapters.of(n).items()
    }
    reference = torch.optim.AdamW([p for some in apart.values() for p in some], lr=1e-2, weight_decay=0.1)
    adapters.pack()
    rates: Rates = {(name, part): Rate(1e-2, 0.1) for name in "as" for part in ALL}
    optimizer = adamw(adapters, rates)
    for step in range(4):
        x = torch.randn(2, N, K, generator=torch.Generator().manual_seed(step)).double()
        with adapters.activate([(Active("a"), Active("s", 0.5))] * 2):
            sum(out.square().sum() for out in whole.block(x, x)).backward()  # type: ignore[operator]
        for (name, layer), some in apart.items():
            place = adapters.of(name)[layer].place
            assert place
            for (_, stacked), own in zip(place.stack.parts(), some, strict=True):
                assert stacked.grad is not None and stacked.grad[place.index].any()
                own.grad = stacked.grad[place.index].clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    for (name, layer), some in apart.items():
        for (_, got), wanted in zip(adapters.of(name)[layer].parts(), some, strict=True):
            assert torch.allclose(got, wanted, rtol=0, atol=1e-14) and not torch.equal(got, torch.ones_like(got))


def test_part_of_a_stack() -> None:
    """Jobs with different groups need this: gradients reach the selected layers, and no others."""
    _, adapters = model((2, 2), False)
    adapters.pack()
    query, key = adapters.of("a")[Q], adapters.of("a")[KEY]
    assert query.place and key.place
    assert stack([query, key]) is query.place.stack
    some = stack([key])
    assert torch.equal(some.up[0], key.up)
    some.up.sum().backward()
    assert key.gradient("up").eq(1).all() and not query.gradient("up").any()


def test_packed_anew() -> None:
    """After a change of form, or with a further adapter, trained values are kept."""
    _, adapters = model((2, 2), False)
    adapters.pack()
    with torch.no_grad():
        adapters.pieces_of("a")[0].up.mul_(2)
    before = {name: one.folded() for name, one in adapters.of("a").items()}
    adapters.of("a")[Q].channels = torch.nn.Parameter(torch.ones(6).double())
    adapters.pack()
    assert len(adapters.pieces()) == 4 and adapters.of("a")[Q].place != adapters.of("a")[KEY].place
    assert all(torch.equal(one.folded().up, before[name].up) for name, one in adapters.of("a").items())


def test_moments_that_were_saved_fit_their_parameters() -> None:
    """A file stores tensors row by row, a stack stores `up` rank by rank, and AdamW's kernel ignores strides."""
    ends = []
    for cut in (False, True):
        whole, adapters = model((2, 3), False)
        adapters.pack()
        rates: Rates = {("a", "down"): Rate(1e-2), ("a", "up"): Rate(1e-2)}
        optimizer = adamw(adapters, rates)
        for step in range(4):
            if cut and step == 2:
                saved = optimizer.state_dict()
                moments = {
                    i: {k: v.clone().contiguous() for k, v in some.items()} for i, some in saved["state"].items()
                }
                optimizer = adamw(adapters, rates)
                optimizer.load_state_dict({"state": moments, "param_groups": saved["param_groups"]})
            x = torch.randn(2, N, K, generator=torch.Generator().manual_seed(step)).double()
            with adapters.activate([(Active("a"),)] * 2):
                sum(out.square().sum() for out in whole.block(x, x)).backward()  # type: ignore[operator]
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for one in adapters.of("a").values() for _, p in one.parts()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
