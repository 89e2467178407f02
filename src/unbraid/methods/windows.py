"""Windows of timesteps in training: the content adapter and the style adapter each learn in a part of the noise levels only.

CRAFT (arXiv 2602.18936) lets a content LoRA act in the first 35 of 50 sampling steps and a style LoRA in the last 35, because
the layout of a picture is decided at high noise and its texture at low noise. Here the same is a setting of training. A pass
whose adapters have different windows becomes one pass for each window, in which the other adapters act but do not train.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from unbraid.common.errors import UsageError
from unbraid.core.lora import WHOLE, Branch, Span
from unbraid.core.recipe import Recipe
from unbraid.methods.added import adding, setting

ABOUT = """content_part, style_part: the part of the way from noise (0) to picture (1) whose timesteps this adapter learns from, such
    as 0-0.7 or 0.3-1. If the two differ, each adapter has a pass of its own in every step, in which the other one acts but does
    not train, so that a step costs twice as much."""


def spanned(text: str, where: str) -> Span:
    """`0.3-1` as two numbers. Raises UsageError if it is no part of 0 to 1."""
    begin, dash, end = text.partition("-")
    try:
        span = (float(begin), float(end))
    except ValueError:
        span = (1.0, 0.0)
    if not dash or not 0 <= span[0] < span[1] <= 1:
        raise UsageError(f"{text!r} is no part of 0 to 1", f"setting {where}", "For example 0-0.7.")
    return span


def in_windows(recipe: Recipe, content: Span, style: Span) -> Recipe:
    """The same recipe with timesteps from these parts."""
    if content == style == WHOLE:
        return recipe

    def branches(step: int) -> tuple[Branch, ...]:
        return tuple(part for branch in recipe.branches(step) for part in divided(branch, content, style))

    return replace(recipe, branches=branches)


@cache
def divided(branch: Branch, content: Span, style: Span) -> tuple[Branch, ...]:
    """One branch for each window of the adapters that train in it. An adapter called `style` is the style's, all others are
    the content's: with several pairs there are `content`, `content2`, …"""
    windows = {one.adapter: style if one.adapter == "style" else content for one in branch.active}
    trained = dict.fromkeys(windows[one.adapter] for one in branch.active if one.trains)
    return tuple(
        replace(
            branch.training([name for name, window in windows.items() if window == span]),
            noise=replace(branch.noise, part=span),
        )
        for span in trained
    )


def _change(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    content, style = (spanned(given[name], name) for name in ("content_part", "style_part"))
    return in_windows(recipe, content, style)


with_windows = adding((setting("content_part", "0-1", str), setting("style_part", "0-1", str)), ABOUT, _change)
