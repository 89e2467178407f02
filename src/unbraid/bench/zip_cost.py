"""What a step of ZipLoRA costs, against the loop of the formulas: d×k matrices and four calls. `python -m unbraid.bench.zip_cost`

FLOPs, and the bytes kept for gradients, are counted at SDXL's shapes (1024 px, rank 64, bf16) on fake tensors, so without
weights, with flash attention. Times are measured on the embedded base, the loops in turn within one process.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unbraid.adapters import Adapters
from unbraid.base import BLOCKS, Studies, load
from unbraid.bench.art import held_out_art
from unbraid.bench.measure import Meter, encoder_flops, sdxl, side_by_side
from unbraid.lora import Active, Factors
from unbraid.lowrank import delta
from unbraid.methods.ziplora import open_coefficients, ziplora
from unbraid.recipe import Recipe
from unbraid.train import State, lessons, train

ROLES = ("content", "style")
STUDENT = tuple(Active(role, trains=frozenset({"merger"})) for role in ROLES)
LAMBDA, RATE = 0.01, 0.01


class DenseLinear(nn.Module):
    """W0 x + (m_c ⊙ ΔW_c + m_s ⊙ ΔW_s) x with d×k matrices; with `only`, one ΔW as it is."""

    def __init__(self, base: nn.Linear, deltas: list[Tensor]) -> None:
        super().__init__()
        self.base, self.deltas = base, deltas
        self.m = nn.ParameterList(torch.ones_like(one[0]) for one in deltas)
        self.only: int | None = None

    @property
    def weight(self) -> Tensor:  # diffusers' attention code looks at its projections' weights
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        merged = self.deltas[0] * self.m[0] + self.deltas[1] * self.m[1]
        change = merged if self.only is None else self.deltas[self.only]
        return self.base(x) + F.linear(x, change.to(x.dtype))


@contextmanager
def dense_layers(unet: nn.Module, adapters: Adapters) -> Iterator[dict[str, DenseLinear]]:
    """Dense layers in the place of the adapted ones, for a while."""
    parts = [adapters.of(role) for role in ROLES]
    layers = {
        name: DenseLinear(layer.base, [delta(part[name].folded()) for part in parts])
        for name, layer in adapters.layers.items()
    }
    _put(unet, layers)
    try:
        yield layers
    finally:
        _put(unet, adapters.layers)


def _put(unet: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, layer)


def dense_loop(studies: Studies, layers: dict[str, DenseLinear]) -> Iterator[None]:
    """The formulas, one step per item: both students, both teachers, one call each; |cos| summed over layers."""
    rng = torch.Generator().manual_seed(0)
    parameters = [m for layer in layers.values() for m in layer.m]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0)

    def call(only: int | None, i: int) -> Tensor:
        for layer in layers.values():
            layer.only = only
        return studies.predict([samples[i]], [ROLES[i]])

    while True:
        samples = studies.draw(ROLES, frozenset(("noise", "timestep")), rng)
        students = [call(None, i) for i in (0, 1)]
        with torch.no_grad():
            teachers = [call(i, i) for i in (0, 1)]
        loss = sum(F.mse_loss(a, b) for a, b in zip(students, teachers, strict=True))
        loss = loss + LAMBDA * sum(F.cosine_similarity(*layer.m, dim=0).abs() for layer in layers.values())
        optimizer.zero_grad()
        assert isinstance(loss, Tensor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield


def random_loras(adapters: Adapters, rank: int) -> None:
    """Two LoRAs of random factors on every layer. (`Adapters.add` moves them to a device, which fake tensors do not take.)"""
    for i, role in enumerate(ROLES):
        rng = torch.Generator().manual_seed(i)
        for layer in adapters.layers.values():
            d, k = layer.base.weight.shape
            shapes = ((rank, k), (d, rank))
            layer.adapters[role] = Factors(*(torch.randn(*s, generator=rng) / s[1] ** 0.5 for s in shapes))
        adapters.names.append(role)


def counted() -> list[tuple[str, float, float]]:
    """(name, TFLOP of one step, GB kept for gradients) at SDXL's shapes."""
    rows, vae = [], encoder_flops(1024)
    for name, checkpointing, extra in (
        ("dense, four calls, gradient checkpointing", True, 0),
        ("the same, both pictures encoded at every step", True, 2 * vae),
        ("dense, four calls, no checkpointing", False, 0),
    ):
        unet, call = sdxl(1024)
        adapters = Adapters.attach(unet)
        random_loras(adapters, 64)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train(checkpointing)
        with dense_layers(unet, adapters) as layers:
            meter = Meter(unet)
            meter.flops += extra
            meter(lambda call=call: call(1), grad=True, calls=2)
            meter.kept *= 2  # both students' graphs live until the loss
            for layer in layers.values():
                layer.only = 0
            meter(lambda call=call: call(1), grad=False, calls=2)
        rows.append((name, meter.flops / 1e12, meter.kept / 1e9))
    for name, cached in (("ours, live teachers", False), ("ours, cached teachers", True)):
        unet, call = sdxl(1024)
        adapters = Adapters.attach(unet)
        random_loras(adapters, 64)
        for factors in (one for role in ROLES for one in adapters.of(role).values()):
            factors.requires_grad_(False)
            open_coefficients(factors, "column")
        meter = Meter(unet)
        if not cached:
            with adapters.activate([(Active(role, merger=False),) for role in ROLES]):
                meter(lambda call=call: call(2), grad=False)
        with adapters.activate([STUDENT, STUDENT]):
            meter(lambda call=call: call(2), grad=True)
        rows.append((name, meter.flops / 1e12, meter.kept / 1e9))
    return rows


def timed(steps: int = 10, rounds: int = 5) -> list[tuple[str, float]]:
    """(name, median seconds per step) on the embedded base, rank 16; teachers asked ahead are counted in."""
    torch.set_num_threads(1)
    base = load("icons", "cpu")
    picture = held_out_art().picture("fox", "openmoji") * 2 - 1
    pictures = {role: [base.encode_picture(picture, (64, 64, 0, 0, 64, 64))] for role in ROLES}
    studies = Studies(base, pictures, {role: base.encode_prompt(f"a {role}") for role in ROLES})
    (recipe,) = ziplora(BLOCKS["sdxl"], granularity="column", steps=steps)

    def dense() -> Callable[[], None]:
        adapters = Adapters.attach(base.unet)
        random_loras(adapters, 16)

        def go() -> None:
            with dense_layers(base.unet, adapters) as layers:
                for _ in islice(dense_loop(studies, layers), steps):
                    pass
            adapters.detach()

        return go

    def ours(recipe: Recipe, at_once: int, cached: bool) -> Callable[[], None]:
        adapters = Adapters.attach(base.unet)
        random_loras(adapters, 16)
        state = State.fresh(adapters, recipe, torch.Generator().manual_seed(0))

        def go() -> None:
            ahead = lessons(studies, recipe, adapters, state.rng) if cached else None
            for _ in train(studies, recipe, state, at_once, ahead):
                pass
            adapters.detach()

        return go

    ways = {
        "dense, four calls": dense,
        "ours, live teachers, branch by branch": lambda: ours(recipe, 1, False),
        "ours, live teachers, branches batched": lambda: ours(recipe, 2, False),
        "ours, cached teachers, branches batched": lambda: ours(recipe, 2, True),
    }
    return side_by_side(ways, steps, rounds)


def main() -> None:
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        rows = counted()
    torch.set_default_dtype(torch.float32)
    whole, kept = rows[0][1:]
    print("| SDXL, 1024 px, rank 64, one step | TFLOP | ratio | GB kept for gradients | ratio |\n|---|---|---|---|---|")
    for name, flops, saved in rows:
        print(f"| {name} | {flops:.1f} | {flops / whole:.2f} | {saved:.1f} | {saved / kept:.2f} |")
    times = timed()
    print("\n| icons, rank 16, one thread | ms per step | times as fast |\n|---|---|---|")
    for name, seconds in times:
        print(f"| {name} | {seconds * 1e3:.0f} | {times[0][1] / seconds:.2f} |")


if __name__ == "__main__":
    main()
