"""Running the benchmark: every row on every cell, in several processes, shares or on a Ray cluster, all of which share one folder.

A unit is one row on one cell. The name of its folder contains a hash of everything that it depends on (docs/benchmark.md), and its
file is written when it is finished. So a run can be killed at any moment; the next one continues with the units that are missing.
The folder is locked and leased while a worker is at the unit, as job folders are. What another worker has, or trains, comes later.
"""

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from unbraid.bench import results
from unbraid.bench.registry import all_rows
from unbraid.bench.results import Drawing, Unit
from unbraid.bench.rows.row import BASE, Row
from unbraid.bench.rows.training_cache import POLL, TrainingCache, short, slug
from unbraid.bench.rows.version import base_digest, truth_digest, versions
from unbraid.bench.truth.scores import diversity, scored
from unbraid.bench.truth.tasks import Cell, Item, Scale, cells, items
from unbraid.common.errors import UsageError
from unbraid.images import sheets
from unbraid.images.crop import alignment
from unbraid.runs.absolute import absolute_base
from unbraid.runs.cluster import DONE, FAILED, HELD, Cluster, spread
from unbraid.runs.folder import locked
from unbraid.runs.lease import AtWorkError


@dataclass(frozen=True)
class Todo:
    """A unit to be done. It holds the row's name, not the row, so that it can be sent to another process."""

    work: Path
    scale: Scale
    base: str
    row: str
    cell: Cell
    parts: str = ""  # see `TrainingCache`


@dataclass(frozen=True)
class Done:
    """A unit that is done, or the reason why it failed. `held`: another worker has it, or trains what it needs. It comes again."""

    todo: Todo
    unit: Unit | None
    error: str = ""
    held: bool = False


def plan(work: Path, scale: Scale, rows: Sequence[Row], base: str = "icons", parts: str = "") -> list[Todo]:
    """Every unit of a benchmark, seed by seed. `base`, `parts`: as for `unbraid.bases.base.load`."""
    return [
        Todo(work, scale, base, row.name, cell, parts) for cell in cells(scale) for row in rows if row.task == cell.task
    ]


def run(
    todos: Sequence[Todo], processes: int = 1, known: Iterable[Unit] = (), ray: Cluster | None = None
) -> Iterator[Done]:
    """Do the units that are missing, in processes here or on a cluster. Yields every unit: first those that were there, then the
    others as they are finished. `known`: units from a results file, which count as done."""
    missing, by_key = [], {unit.key: unit for unit in known}
    for todo in todos:
        file = unit_file(todo)
        if file.exists():
            yield Done(todo, results.read(file)[0])
        elif key(todo) in by_key:
            yield Done(todo, by_key[key(todo)])
        else:
            missing.append(todo)
    if not missing:
        return
    if ray:
        yield from _there(missing, ray)
    elif processes == 1:
        yield from _here(missing)
    else:
        yield from _in_processes(missing, processes)


def _here(missing: Sequence[Todo]) -> Iterator[Done]:
    waiting = deque(missing)
    while waiting:
        done = do(waiting.popleft())
        waiting += [done.todo] if done.held else []
        yield done


def _in_processes(missing: Sequence[Todo], processes: int) -> Iterator[Done]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        waiting = {pool.submit(do, todo) for todo in missing}
        try:
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for done in (one.result() for one in ended):
                    waiting |= {pool.submit(do, done.todo)} if done.held else set()
                    yield done
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _there(missing: Sequence[Todo], ray: Cluster) -> Iterator[Done]:
    there = [
        replace(todo, work=todo.work.absolute(), base=absolute_base(todo.base), parts=absolute_base(todo.parts))
        for todo in missing
    ]
    for which, how, text in spread(there, answers, ray):
        done = how == DONE
        yield Done(missing[which], results.parsed(text) if done else None, "" if done else text, how == HELD)


def answers(todos: Sequence[Todo]) -> Iterator[tuple[int, str, UsageError | str]]:
    """Do units in a worker process of a cluster, as `cluster.Work`. What is done comes as JSON: the driver may see the file later."""
    for i, todo in enumerate(todos):
        try:
            yield i, DONE, results.to_json(_leased(todo))
        except AtWorkError:
            yield i, HELD, ""
        except UsageError as error:
            yield i, FAILED, error


def do(todo: Todo) -> Done:
    """Do one unit. A UsageError, such as a loss that is not a number, fails this unit and not the run."""
    try:
        return Done(todo, _leased(todo))
    except AtWorkError:
        time.sleep(POLL)
        return Done(todo, None, held=True)
    except UsageError as error:
        return Done(todo, None, str(error))


def _leased(todo: Todo) -> Unit:
    """Do a unit that is not done, while no other worker is at it. AtWorkError if one is."""
    file = unit_file(todo)
    if not file.exists():
        with locked(file.parent, shared=True) as check:
            if not file.exists():
                unit = _do(todo, file)
                check()
                results.write(unit, file)
    return results.read(file)[0]  # with rounded figures, as a later run will read them


def _do(todo: Todo, file: Path) -> Unit:
    cache, row, cell = _training_cache(todo.work, todo.scale, todo.base, todo.parts), _row(todo), todo.cell
    cache.spent()
    drawers = row.make(cache, cell, row.settings)
    cost, drawings, varied = cache.spent(), [], None
    for item in items(cell, todo.scale):
        if item.use not in drawers:
            continue
        images = drawers[item.use](item, item.seeds)
        if len(images) > 1:
            varied = diversity(images, item.truth, cache.base)
        for seed, image in zip(item.seeds, images, strict=True):
            name = f"{len(drawings):02d}.png"
            sheets.save_image(image, file.with_name(name))
            found = scored(item, image, cache.base)
            if cell.task == "transfer":
                found["structure"] = 1.0 if row.name == BASE else alignment(cache.plain(item, seed), image)
            where = str(file.with_name(name).relative_to(todo.work))
            truth = item.truth
            drawings.append(Drawing(item.use, item.prompt, truth.subject, truth.style, seed, where, found))
    made = {"base": base_digest(todo.base), "truth": truth_digest()}
    return Unit(key(todo), cell.task, row.name, str(cell), cell.seed, tuple(drawings), varied, cost, made)


def unit_file(todo: Todo) -> Path:
    name = slug(f"{todo.cell.task} {todo.row} {todo.cell}")[:80]
    return todo.work / "units" / f"{name}-{key(todo)}" / "unit.json"


def key(todo: Todo) -> str:
    """A hash of everything that a unit depends on."""
    row, drawn = _row(todo), [_identity(item) for item in items(todo.cell, todo.scale)]
    training = {method: dict(settings) for method, settings in todo.scale.training.items()}
    own = (row.task, row.name, row.version, dict(row.settings), versions(row.methods), str(todo.cell))
    return short(own, drawn, todo.scale.steps, training, base_digest(todo.base), truth_digest())


def _identity(item: Item) -> list[object]:
    leaks = {kind: str(truth) for kind, truth in item.leaks.items()}
    return [item.use, item.prompt, str(item.truth), leaks, item.seeds]


@cache
def _rows() -> dict[tuple[str, str], Row]:
    return {(row.task, row.name): row for row in all_rows()}


def _row(todo: Todo) -> Row:
    return _rows()[todo.cell.task, todo.row]


@cache
def _training_cache(work: Path, scale: Scale, base: str, parts: str) -> TrainingCache:
    """One per process, because it holds the loaded base."""
    return TrainingCache(work, scale, base, waits=False, parts=parts)


def _begin(parent: int) -> None:
    """A worker process uses one thread, and exits within a second after its parent has gone, however the parent was killed."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
