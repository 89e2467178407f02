"""8-bit AdamW: codes with the right mean, results close to AdamW, two bytes per number, and exact resuming."""

import copy

import pytest
import torch
from torch import Tensor, nn

from unbraid.core import optim8
from unbraid.core.optim8 import BLOCK, MEAN, SQUARE, AdamW8


@pytest.mark.slow
def test_codes_are_right_in_the_mean_and_close_every_time() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(BLOCK * 2 + 7, generator=rng) * 10 ** torch.empty(BLOCK * 2 + 7).uniform_(-3, 0, generator=rng)
    for code, values, least in ((MEAN, x, 0), (SQUARE, x.square(), 1)):
        some = []
        for _ in range(2000):
            codes, scale = code.write(values, rng, least)
            assert codes.dtype == code.dtype and len(codes) == len(x) and len(scale) == 3
            some.append(code.read(codes, scale))
        kept = (
            values.abs() > 10 ** (1 - code.decades) * values.abs().max()
        )  # smaller values become 0 or the smallest magnitude
        read, values = torch.stack(some)[:, kept], values[kept]
        assert int(kept.sum()) > 400 and float((read / values - 1).abs().max()) < code.ratio - 1 + 1e-4
        assert float((read.mean(0) / values - 1).abs().max()) < 5 * (code.ratio - 1) / 2000**0.5
    zero, scale = MEAN.write(torch.zeros(5), rng, 0)
    assert not MEAN.read(zero, scale).any()


def problem() -> tuple[nn.Parameter, nn.Parameter, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    wanted = torch.randn(48, 4, generator=rng) @ torch.randn(4, 64, generator=rng) / 4
    scales = 10 ** torch.empty(64).uniform_(-2, 0, generator=rng)  # inputs with very different magnitudes
    down, up = torch.randn(6, 64, generator=rng) * 0.3, torch.zeros(48, 6)
    return nn.Parameter(down), nn.Parameter(up), wanted, torch.randn(256, 64, generator=rng) * scales


def losses(
    optimizer: torch.optim.Optimizer, parts: tuple[nn.Parameter, nn.Parameter, Tensor, Tensor], steps: int
) -> list[float]:
    down, up, wanted, x = parts
    out = []
    for _ in range(steps):
        loss = (x @ (up @ down - wanted).T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(float(loss.detach()))
    return out


@pytest.mark.slow
def test_it_learns_as_adamw_does() -> None:
    runs = {}
    for make in (torch.optim.AdamW, AdamW8):
        parts = problem()
        group = {"params": list(parts[:2]), "lr": 1e-2, "weight_decay": 1e-4}
        runs[make] = losses(make([group]), parts, 600)
    ours, theirs = runs[AdamW8], runs[torch.optim.AdamW]
    assert abs(ours[0] - theirs[0]) < 1e-9 and abs(ours[1] / theirs[1] - 1) < 1e-4, "the first update is exact"
    assert abs(ours[60] / theirs[60] - 1) < 0.05 and ours[-1] < 0.02 * ours[0] and ours[-1] < 1.5 * theirs[-1]


def test_two_bytes_per_number() -> None:
    parts = problem()
    optimizer = AdamW8([{"params": list(parts[:2]), "lr": 1e-3, "weight_decay": 0.0}])
    losses(optimizer, parts, 1)
    size = sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values())
    count = sum(p.numel() for p in parts[:2])
    assert 2 * count < size < 2.1 * count


def test_a_resumed_run_is_the_same() -> None:
    parts = problem()
    optimizer = AdamW8([{"params": list(parts[:2]), "lr": 1e-2, "weight_decay": 1e-2}])
    losses(optimizer, parts, 5)
    others = (nn.Parameter(parts[0].detach().clone()), nn.Parameter(parts[1].detach().clone()), *parts[2:])
    resumed = AdamW8([{"params": list(others[:2]), "lr": 1e-2, "weight_decay": 1e-2}])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as from a file
    assert losses(optimizer, parts, 5) == losses(resumed, others, 5)
    assert torch.equal(parts[0], others[0]) and torch.equal(parts[1], others[1])


@pytest.mark.slow
def test_a_large_tensor_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part has its own scales. The first update is exact, and later ones are close to those of one part."""
    runs = {}
    for bucket in (optim8.BUCKET, BLOCK):  # `up` is 288 numbers, `down` 384
        monkeypatch.setattr(optim8, "BUCKET", bucket)
        parts = problem()
        optimizer = AdamW8([{"params": [p], "lr": 1e-2, "weight_decay": 1e-4} for p in parts[:2]])
        runs[bucket] = losses(optimizer, parts, 300)
        state = optimizer.state[parts[0]]
        assert len(state["mean"]) == 384 and len(state["mean_scale"]) == 2
    whole, cut = runs.values()
    assert cut[:2] == whole[:2] and abs(cut[60] / whole[60] - 1) < 0.05 and cut[-1] < 0.02 * cut[0]


def test_what_has_no_gradient_stays() -> None:
    still, moving = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = AdamW8([{"params": [still, moving], "lr": 0.1, "weight_decay": 0.1}])
    moving.square().sum().backward()
    optimizer.step()
    assert torch.equal(still, torch.ones(4)) and not torch.equal(moving, torch.ones(4))
