"""Settings that several methods have: they are described once, and change the recipe that a method has made."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter
from typing import Any

from unbraid.core.recipe import Recipe
from unbraid.methods.entry import Blocks, Method

Change = Callable[[Recipe, Mapping[str, Any]], Recipe]  # a recipe, and the settings: those given, and the added ones


def setting(name: str, default: Any, annotation: Any) -> Parameter:
    """One setting."""
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def adding(settings: Sequence[Parameter], about: str, change: Change) -> Callable[[Method], Method]:
    """A function that gives a method these settings. `about` describes each, as `name: text.`"""

    def added(method: Method) -> Method:
        @wraps(method)
        def made(blocks: Blocks, **given: Any) -> tuple[Recipe, ...]:
            own = {one.name: given.pop(one.name, one.default) for one in settings}
            return tuple(change(recipe, {**given, **own}) for recipe in method(blocks, **given))

        signature = inspect.signature(method)
        made.__signature__ = signature.replace(parameters=(*signature.parameters.values(), *settings))  # type: ignore[attr-defined]
        made.__doc__ = f"{(method.__doc__ or '').rstrip()}\n    {about}\n    "
        return made

    return added
