"""Running the benchmark: every row on every cell that is not there yet, over processes that share one folder.

A unit is known by a hash of what it depends on (docs/benchmark.md), and appears all at once when it is finished: killed at
any moment and started again, nothing finished is done twice.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from unbraid.bench import results
from unbraid.bench.registry import all_rows
from unbraid.bench.results import Drawing, Unit
from unbraid.bench.rows import BASE, Row
from unbraid.bench.scores import diversity, scored
from unbraid.bench.shop import Shop, short, slug
from unbraid.bench.truth.tasks import Cell, Item, Scale, cells, items
from unbraid.bench.version import base_digest, truth_digest, versions
from unbraid.common.errors import UsageError
from unbraid.images import sheets as pictures
from unbraid.images.crop import alignment


@dataclass(frozen=True)
class Todo:
    """One row on one cell, by name, so that it can be sent to another process."""

    work: Path
    scale: Scale
    base: str
    row: str
    cell: Cell


@dataclass(frozen=True)
class Done:
    """What became of one unit."""

    todo: Todo
    unit: Unit | None
    error: str = ""


def plan(work: Path, scale: Scale, rows: Sequence[Row], base: str = "icons") -> list[Todo]:
    """Every unit of a benchmark, in the order in which they are worth doing."""
    return [Todo(work, scale, base, row.name, cell) for cell in cells(scale) for row in rows if row.task == cell.task]


def run(todos: Sequence[Todo], processes: int = 1, known: Iterable[Unit] = ()) -> Iterator[Done]:
    """Do what is not there yet, yielding every unit as it comes; those that were there come first. `known`: units that were made
    elsewhere."""
    waiting, elsewhere = [], {unit.key: unit for unit in known}
    for todo in todos:
        file = unit_file(todo)
        if file.exists():
            yield Done(todo, results.read(file)[0])
        elif key(todo) in elsewhere:
            yield Done(todo, elsewhere[key(todo)])
        else:
            waiting.append(todo)
    if processes == 1:
        yield from map(do, waiting)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        jobs = [pool.submit(do, todo) for todo in waiting]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def do(todo: Todo) -> Done:
    """One unit. What a user can mend, such as a loss that is not a number, fails this unit alone."""
    try:
        return Done(todo, _do(todo))
    except UsageError as error:
        return Done(todo, None, str(error))


def _do(todo: Todo) -> Unit:
    shop, row, cell, file = _shop(todo.work, todo.scale, todo.base), _row(todo), todo.cell, unit_file(todo)
    shop.spent()
    hands = row.make(shop, cell, row.settings)
    cost, drawings, spread = shop.spent(), [], None
    for item in items(cell, todo.scale):
        if item.use not in hands:
            continue
        images = hands[item.use](item, item.seeds)
        if len(images) > 1:
            spread = diversity(images, item.truth, shop.base)
        for seed, image in zip(item.seeds, images, strict=True):
            name = f"{len(drawings):02d}.png"
            pictures.save_image(image, file.with_name(name))
            found = scored(item, image, shop.base)
            if cell.task == "transfer":
                found["structure"] = 1.0 if row.name == BASE else alignment(shop.plain(item, seed), image)
            where = str(file.with_name(name).relative_to(todo.work))
            truth = item.truth
            drawings.append(Drawing(item.use, item.prompt, truth.subject, truth.style, seed, where, found))
    made = {"base": base_digest(todo.base), "truth": truth_digest()}
    unit = Unit(key(todo), cell.task, row.name, str(cell), cell.seed, tuple(drawings), spread, cost, made)
    results.write(unit, file)
    return results.read(file)[0]  # as a later run will find it, to the same place


def unit_file(todo: Todo) -> Path:
    name = slug(f"{todo.cell.task} {todo.row} {todo.cell}")[:80]
    return todo.work / "units" / f"{name}-{key(todo)}" / "unit.json"


def key(todo: Todo) -> str:
    """Of everything that a unit depends on."""
    row, asked = _row(todo), [_asked(item) for item in items(todo.cell, todo.scale)]
    training = {method: dict(settings) for method, settings in todo.scale.training.items()}
    own = (row.task, row.name, row.version, dict(row.settings), versions(row.methods), str(todo.cell))
    return short(own, asked, todo.scale.steps, training, base_digest(todo.base), truth_digest())


def _asked(item: Item) -> list[object]:
    leaks = {kind: str(truth) for kind, truth in item.leaks.items()}
    return [item.use, item.prompt, str(item.truth), leaks, item.seeds]


@cache
def _rows() -> dict[tuple[str, str], Row]:
    return {(row.task, row.name): row for row in all_rows()}


def _row(todo: Todo) -> Row:
    return _rows()[todo.cell.task, todo.row]


@cache
def _shop(work: Path, scale: Scale, base: str) -> Shop:
    """One for a process: it keeps the loaded base."""
    return Shop(work, scale, base)


def _begin(parent: int) -> None:
    """A worker has one thread, and does not outlive the process that it works for, however that one is killed."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
