"""What `--jaxtyping-packages` does to every function of the package, at a fraction of the cost. Imported before the package is."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import jaxtyping
from beartype import beartype

whole = jaxtyping.jaxtyped
# Calls of a function with shapes that are checked in a test: the first ones, and of the later ones one in so many. A prime,
# so that it is not always the same layer's. A hundred first ones took 52.0 s in place of 45.8 in a test of trainings.
FIRST, EVERY = 20, 19
# Emptied around each test, so that what a test checks does not depend on other tests.
calls = Counter[Callable[..., Any]]()


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """jaxtyping's wrapper binds the arguments and remembers sizes at every call: only annotations with shapes need it, and not
    at thousands of calls in one test. The others are checked by beartype alone. Texts may be names of shapes. Dataclasses are
    checked when they are made. Functions inside of functions would be wrapped, and compiled, whenever the outer one is called:
    they are not checked."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(function) and is_dataclass(function) and "__init__" in vars(function):
        function.__init__ = jaxtyped(function.__init__, typechecker=typechecker)
        return function
    if not inspect.isfunction(function):
        return whole(typechecker=typechecker)(function)
    if "<locals>" in function.__qualname__:
        return function
    hints = getattr(function, "__annotations__", {}).values()
    if not any(isinstance(hint, str) or "jaxtyping" in repr(hint) for hint in hints):
        return beartype(function)
    checked = whole(typechecker=typechecker)(function)

    @functools.wraps(function)
    def sampled(*given: Any, **named: Any) -> Any:
        calls[function] += 1
        skipped = calls[function] > FIRST and calls[function] % EVERY
        return (function if skipped else checked)(*given, **named)

    return sampled


jaxtyping.jaxtyped = jaxtyped  # the import hook finds it here
