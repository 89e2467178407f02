"""How far a long preparation is. Whoever shows it watches; without a watcher nothing is shown."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Watcher = Callable[[str, int, int], None]  # (what is done, how many are done, of how many)
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` for every step of every preparation inside the `with` block."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, one by one; the watcher is told about each."""
    for i, item in enumerate(items):
        if watcher := _watcher.get():
            watcher(what, i, len(items))
        yield item
