"""The behaviour of a CUDA graph on any device: operators are recorded once, with their tensors, then repeated on the same
memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unbraid.core.graphs import Call

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh", "masked_select", "unique")


class _Recording(TorchDispatchMode):
    """Fails if code would wait for a GPU: by reading values in Python, or by sending constants to it (`torch.tensor`)."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was written into, and its values before the recording
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} in a captured call"
        for argument, one in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write and isinstance(one, Tensor)
            if written and not {key := one.untyped_storage()._cdata} & (self.made | self.before.keys()):
                self.before[key] = (one, one.clone())
        out = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable:
            given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            made = {one.untyped_storage()._cdata for one in tree_leaves(out) if isinstance(one, Tensor)}
            self.made |= made - given
        self.done.append((func, args, kwargs or {}, out))
        return out


class Recorder:
    """An executor of `unbraid.core.graphs`. Python code runs only while it records, so its decisions are fixed then."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.eager_calls, self.captures, self.replays = fails, 0, 0, 0

    def eager(self, call: Call) -> Tensor:
        self.eager_calls += 1
        return call()

    def capture(self, call: Call) -> Call:
        if self.fails:
            raise RuntimeError(self.fails)
        self.captures += 1
        with _Recording() as recording:
            static = call()
        with torch.no_grad():
            for tensor, values in recording.before.values():  # CUDA records kernels without running them
                tensor.copy_(values)

        def replay() -> Tensor:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, out in recording.done:
                    _again(func, args, kwargs, out)
            return static

        return replay


def _again(func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
    """Repeat an operator, and copy the result into the memory of the recording. Views and in-place results are there already."""
    given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
    for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, Tensor) and old.untyped_storage()._cdata not in given:
            old.copy_(new)
