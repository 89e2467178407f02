"""A row of the benchmark: one way to solve a task, as a function that prepares the LoRAs of a cell and returns its drawers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from unbraid.bench.rows.training_cache import Drawer, TrainingCache
from unbraid.bench.truth.tasks import Cell, Task
from unbraid.runs.settings import Settings

BASE, CEILING, COPY = "base alone", "true counterpart", "copy of the input"  # the rows of `sanity.py`
Drawers = Mapping[str, Drawer]  # use (`content`, `style` or `both`) → the function that draws it
Make = Callable[[TrainingCache, Cell, Settings], Drawers]


@dataclass(frozen=True)
class Row:
    """One way to solve a task. `make(cache, cell, settings)` trains what is needed and returns a drawer for each use that the row
    can draw."""

    task: Task
    name: str
    make: Make
    settings: Settings = field(default_factory=dict)  # passed to `make`
    ablation: bool = False  # runs only when it is named
    methods: tuple[str, ...] = ()  # the methods that it trains: its results depend on their versions
    version: int = 1  # to be raised when the same settings draw other pictures


def every_use(drawer: Drawer) -> Drawers:
    """The same drawer for `content`, `style` and `both`."""
    return dict.fromkeys(("content", "style", "both"), drawer)
