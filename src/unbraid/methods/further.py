"""Further losses and steps for methods that train a content adapter and a style adapter. Each is a setting that is off by
default, and keeps the two apart in another way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Branch, Part
from unbraid.core.recipe import Recipe
from unbraid.methods.added import adding, setting
from unbraid.methods.entry import Method

NOTHING: frozenset[Part] = frozenset()
PRIOR = """prior_weight: weight of a further loss on pictures that the base draws of `a {subject}`, under that prompt, with one
    adapter alone ({which}): prior preservation as in DreamBooth, against what an adapter does without its words. It costs a pass
    per step."""
LEAK = """leak_weight: weight of a further loss: under the prompt of the content, the style adapter alone must predict what the
    base predicts, so that it holds nothing of the subject. It costs a pass per step, and one of the base without gradients."""
ANEW = """style_steps: further steps at the end, in which the style is learnt again beside the finished content adapter, which acts
    but does not train, so that the style is what the content has not. Not with `official`."""


def with_prior(roles: Sequence[str]) -> Callable[[Method], Method]:
    """Give a method the setting `prior_weight`, for these adapters."""

    def change(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
        return preserving(recipe, roles, given["prior_weight"])

    which = "the two take turns" if len(roles) > 1 else f"the {roles[0]}"
    return adding((setting("prior_weight", 0.0, float),), PRIOR.replace("{which}", which), change)


def preserving(recipe: Recipe, roles: Sequence[str], weight: float) -> Recipe:
    """The same recipe with a prior loss (arXiv 2208.12242, as it is used with LoRAs). Of the adapters `roles`, those that
    train in a step take turns: one pass with that adapter alone, on a picture `prior`, under the prompt `prior`."""

    def branches(step: int) -> tuple[Branch, ...]:
        usual = recipe.branches(step)
        trained = {one.adapter: one.trains for branch in usual for one in branch.active if one.trains}
        names = [role for role in roles if role in trained]
        if not names:
            return usual
        name = names[step % len(names)]
        return (*usual, Branch("prior", "prior", (Active(name, trains=trained[name]),), weight=weight))

    return replace(recipe, branches=branches) if weight else recipe


def guarded(recipe: Recipe, weight: float) -> Recipe:
    """The same recipe with the leak loss, in steps in which the style adapter trains:

        E ‖ε_style(x_t, c) − ε(x_t, c)‖²

    where x_t is the noisy picture, c the prompt of the content, which names the subject and not the style, ε the prediction of
    the base, and ε_style that with the style adapter. Whatever the style adapter knows of the subject must not show
    when its own words are missing."""

    def branches(step: int) -> tuple[Branch, ...]:
        usual = recipe.branches(step)
        trains = next((one.trains for branch in usual for one in branch.active if one.adapter == "style"), NOTHING)
        teacher = Branch("image", "content")
        leak = Branch("image", "content", (Active("style", trains=trains),), teacher, weight)
        return (*usual, leak) if trains else usual

    return replace(recipe, branches=branches) if weight else recipe


with_leak = adding(
    (setting("leak_weight", 0.0, float),), LEAK, lambda recipe, given: guarded(recipe, given["leak_weight"])
)


def style_anew(recipe: Recipe, further: int) -> Recipe:
    """The same recipe with further steps: `up` of the style starts from 0 again, and the passes that train it go on without
    training the content. As in ConsisLoRA (arXiv 2503.10614), but in all layers, and with the `down` learnt so far. The penalty
    ends with the usual steps."""
    if not further:
        return recipe
    first, hooks = recipe.steps, recipe.hooks

    def branches(step: int) -> tuple[Branch, ...]:
        usual = recipe.branches(step)
        return usual if step < first else tuple(one.training(["style"]) for one in usual if trains_style(one))

    def after_step(adapters: Adapters, step: int) -> bool | None:
        done = hooks.after_step(adapters, step) if hooks.after_step else None
        if step == first - 1:
            with torch.no_grad():
                for factors in adapters.pieces_of("style"):
                    factors.up.zero_()
        return done

    def penalty(adapters: Adapters, step: int) -> Tensor | None:
        return hooks.penalty(adapters, step) if hooks.penalty and step < first else None

    hooked = replace(hooks, penalty=penalty, after_step=after_step)
    return replace(recipe, steps=first + further, branches=branches, hooks=hooked)


def trains_style(branch: Branch) -> bool:
    """Whether the style adapter trains in this pass."""
    return any(one.adapter == "style" and one.trains for one in branch.active)


def _anew(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    if given["style_steps"] and given.get("compat") == "official":
        raise UsageError("the published code has no style_steps", "unziplora", "Leave out one of the two.")
    return style_anew(recipe, given["style_steps"])


with_style_steps = adding((setting("style_steps", 0, int),), ANEW, _anew)
