"""Measures a sampling step under style guidance: with separate calls, with one batch, and with fewer evaluations."""

from contextlib import nullcontext

import torch

from unbraid.bases.base import load
from unbraid.bench.measure import Way, side_by_side
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active
from unbraid.sampling.sample import NEGATIVE, Guided, Style, Term, style_guidance


def evaluations(rounds: int = 40) -> list[tuple[str, float]]:
    """(name, median seconds per sampling step) of style guidance on the embedded base."""
    base = load("icons", "cpu")
    adapters = Adapters.attach(base.denoiser)
    adapters.new("style", 16, torch.Generator().manual_seed(0), up_std=0.1)
    prompts = {role: base.encode_prompt(f"a {role}") for role in (NEGATIVE, "main", "style")}
    latent = torch.randn(1, base.denoiser.config["in_channels"], *[base.denoiser.config["sample_size"]] * 2)
    style, w = Active("style"), 4.0

    def way(*formulas: tuple[Term, ...]) -> Way:
        guided = [Guided(base, terms, prompts, adapters) for terms in formulas]

        @torch.no_grad()
        def go() -> None:
            for one in guided:
                one(latent, torch.tensor(500))

        return lambda: nullcontext(go)

    def one(role: str, *active: Active) -> tuple[Term, ...]:
        return (Term(1.0, role, active),)

    ways = {
        "three evaluations, one call each": way(one(NEGATIVE), one("main"), one("style", style)),
        "ours, w_L ≠ w: three in one batch": way(style_guidance(w, "main", [Style(style, "style", w / 2)])),
        "ours, w_L = w: two in one batch": way(style_guidance(w, "main", [Style(style, "style", w)])),
        "plain guidance: two in one batch": way(style_guidance(w, "main", [])),
    }
    return side_by_side(ways, 1, rounds)
