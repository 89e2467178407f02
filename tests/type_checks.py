"""What `--jaxtyping-packages` does to every function of the package, at half the cost. Imported before the package is."""

import functools
import inspect
from typing import Any

import jaxtyping
from beartype import beartype

whole = jaxtyping.jaxtyped


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """jaxtyping's wrapper binds the arguments and remembers sizes at every call: only annotations with shapes need it.
    The others are checked by beartype alone. Texts may be names of shapes."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    hints = getattr(function, "__annotations__", {}).values()
    if inspect.isfunction(function) and not any(isinstance(hint, str) or "jaxtyping" in repr(hint) for hint in hints):
        return beartype(function)
    return whole(typechecker=typechecker)(function)


jaxtyping.jaxtyped = jaxtyped  # the import hook finds it here
