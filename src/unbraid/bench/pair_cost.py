"""What Pair Customization costs, against its formulas as they stand. `python -m unbraid.bench.pair_cost`

By the formulas: at every step both pictures are encoded, each loss has a forward and a backward pass of its own, the rows of
both adapters get gradients that nobody uses, and style guidance is three evaluations. FLOPs are counted at SDXL's shapes, as in
`zip_cost`; times are measured on the embedded base.
"""

from collections.abc import Callable, Generator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unbraid.adapters import Adapters
from unbraid.base import BLOCKS, Base, Studies, load
from unbraid.bench.art import held_out_art
from unbraid.bench.measure import Meter, encoder_flops, sdxl, side_by_side
from unbraid.lora import Active, Factors, Part
from unbraid.methods.pair import pair
from unbraid.optim import adamw
from unbraid.recipe import Recipe
from unbraid.sample import NEGATIVE, Guided, Style, Term, style_guidance
from unbraid.train import State, train

SIDE, RANK, STEPS, STYLE_FROM = 512, 64, 750, 250  # as published
UP: frozenset[Part] = frozenset({"up"})
BOTH: frozenset[Part] = frozenset({"down", "up"})
CONTENT = (Active("content", trains=UP),)
STYLED = (Active("content", trains=frozenset()), Active("style", trains=UP))


def counted() -> list[tuple[str, float, float]]:
    """(name, PFLOP of a whole training, GB kept for gradients) at SDXL's shapes."""
    encodes, rows = 2 * STEPS * encoder_flops(SIDE), []
    for name, encoded, checkpointing in (
        ("as the formulas stand, gradient checkpointing", encodes, True),
        ("as the formulas stand", encodes, False),
        ("the same, pictures encoded once", 0, False),
    ):
        meter = _separate(checkpointing)
        rows.append((name, (meter.flops + encoded) / 1e15, meter.kept / 1e9))
    meter = _together()
    return [*rows, ("ours", meter.flops / 1e15, meter.kept / 1e9)]


def _separate(checkpointing: bool) -> Meter:
    """A pass for each loss, with gradients for the frozen rows; the larger of the two passes' memory."""
    unet, call = sdxl(SIDE)
    adapters = _adapters(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    total, kept = Meter(unet), []
    for active, calls in ((CONTENT, STEPS), (STYLED, STEPS - STYLE_FROM)):
        now = tuple(replace(one, trains=BOTH if one.trains else one.trains) for one in active)
        meter = Meter(unet)
        with adapters.activate([now]):
            meter(lambda: call(1), grad=True, calls=calls)
        total.flops += meter.flops
        kept.append(meter.kept)
    total.kept = max(kept)
    return total


def _together() -> Meter:
    """One pass for both losses, once the style has joined."""
    unet, call = sdxl(SIDE)
    adapters = _adapters(unet)
    total = Meter(unet)
    for rows, calls in (((CONTENT,), STYLE_FROM), ((CONTENT, STYLED), STEPS - STYLE_FROM)):
        meter = Meter(unet)
        with adapters.activate(list(rows)):
            meter(lambda rows=rows: call(len(rows)), grad=True, calls=calls)
        total.flops += meter.flops
        total.kept = max(total.kept, meter.kept)
    return total


def _adapters(unet: nn.Module) -> Adapters:
    """Two adapters of random ups on every layer; one down for all layers of a width."""
    adapters, bases = Adapters.attach(unet), {}
    for name in ("content", "style"):
        for layer in adapters.layers.values():
            d, k = layer.base.weight.shape
            down = bases.setdefault((name, k), torch.randn(RANK, k) / k**0.5)
            layer.adapters[name] = Factors(down, torch.randn(d, RANK) / 8)
        adapters.names.append(name)
    return adapters


def formulas(base: Base, pixels: dict[str, Tensor], studies: Studies, recipe: Recipe) -> Generator[None]:
    """Training as published: pictures encoded at every step, one loss after the other, each with its own step."""
    adapters = Adapters.attach(base.unet)
    recipe.prepare(adapters, torch.Generator().manual_seed(0))
    optimizer, rng = adamw(adapters, recipe.rates), torch.Generator().manual_seed(0)
    try:
        while True:
            pictures = {role: [base.encode_picture(values, (64, 64, 0, 0, 64, 64))] for role, values in pixels.items()}
            fresh = Studies(base, pictures, studies.encoded)
            for branch, sample in zip(recipe.branches(0), fresh.draw(list(pixels), recipe.shared, rng), strict=True):
                with adapters.activate([branch.active]):
                    F.mse_loss(fresh.predict([sample], [branch.prompt]), sample.target).backward()
                optimizer.step()
                optimizer.zero_grad()
            yield
    finally:
        adapters.detach()


def timed(steps: int = 10, rounds: int = 5) -> list[tuple[str, float]]:
    """(name, median seconds per step with both losses) on the embedded base."""
    base, art = load("icons", "cpu"), held_out_art()
    names = {"before": "fluent-emoji-flat", "after": "fluent-emoji-high-contrast"}
    pixels = {role: art.picture("fox", of) * 2 - 1 for role, of in names.items()}
    pictures = {role: [base.encode_picture(values, (64, 64, 0, 0, 64, 64))] for role, values in pixels.items()}
    studies = Studies(base, pictures, {role: base.encode_prompt(f"a {role}") for role in ("content", "style")})
    (recipe,) = pair(BLOCKS["sdxl"], rank=16, steps=steps, style_from=0)

    def published() -> Callable[[], None]:
        loop = formulas(base, pixels, studies, recipe)

        def go() -> None:
            for _ in range(steps):
                next(loop)
            loop.close()

        return go

    def ours() -> Callable[[], None]:
        adapters = Adapters.attach(base.unet)
        state = State.fresh(adapters, recipe, torch.Generator().manual_seed(0))

        def go() -> None:
            for _ in train(studies, recipe, state, 2):
                pass
            adapters.detach()

        return go

    return side_by_side({"as the formulas stand": published, "ours": ours}, steps, rounds)


def evaluations(rounds: int = 40) -> list[tuple[str, float]]:
    """(name, median seconds per sampling step) of style guidance on the embedded base."""
    base = load("icons", "cpu")
    adapters = Adapters.attach(base.unet)
    adapters.new("style", 16, torch.Generator().manual_seed(0), up_std=0.1)
    prompts = {role: base.encode_prompt(f"a {role}") for role in (NEGATIVE, "main", "style")}
    latent = torch.randn(1, base.unet.config["in_channels"], *[base.unet.config["sample_size"]] * 2)
    style, w = Active("style"), 4.0

    def ask(*formulas: tuple[Term, ...]) -> Callable[[], Callable[[], None]]:
        guided = [Guided(base, terms, prompts, adapters) for terms in formulas]

        @torch.no_grad()
        def go() -> None:
            for one in guided:
                one(latent, torch.tensor(500))

        return lambda: go

    def one(role: str, *active: Active) -> tuple[Term, ...]:
        return (Term(1.0, role, active),)

    ways = {
        "three evaluations, one call each": ask(one(NEGATIVE), one("main"), one("style", style)),
        "ours, w_L ≠ w: three in one batch": ask(style_guidance(w, "main", [Style(style, "style", w / 2)])),
        "ours, w_L = w: two in one batch": ask(style_guidance(w, "main", [Style(style, "style", w)])),
        "plain guidance: two in one batch": ask(style_guidance(w, "main", [])),
    }
    return side_by_side(ways, 1, rounds)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        rows = counted()
    torch.set_default_dtype(torch.float32)
    print(
        f"| SDXL, {SIDE} px, rank {RANK}, {STEPS} steps, style from {STYLE_FROM} | PFLOP | ratio | GB kept for gradients | ratio |"
    )
    print("|---" * 5 + "|")
    for name, flops, kept in rows:
        print(f"| {name} | {flops:.2f} | {flops / rows[1][1]:.2f} | {kept:.1f} | {kept / rows[1][2]:.2f} |")
    for title, times in (("training, icons, rank 16", timed()), ("sampling, icons", evaluations())):
        print(f"\n| {title}, one thread | ms per step | times as fast |\n|---|---|---|")
        for name, seconds in times:
            print(f"| {name} | {seconds * 1e3:.0f} | {times[0][1] / seconds:.2f} |")


if __name__ == "__main__":
    main()
