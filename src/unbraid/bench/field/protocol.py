"""The benchmark's rows on a user's own base and pictures, drawn with the prompts of papers and scored with their metrics.

A unit is one row on one content and style with one seed. Its file is written when it is finished, so a run can be killed at any moment
and the next one continues. The drawings do not depend on the measuring models: with other models they are scored again, not drawn
again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from unbraid.bench import results
from unbraid.bench.field.given import Given, read_given
from unbraid.bench.field.models import FieldModels
from unbraid.bench.field.scores import diversity, measure
from unbraid.bench.grid import Done, Todo
from unbraid.bench.registry import chosen
from unbraid.bench.results import Drawing, Unit
from unbraid.bench.rows.row import CEILING, Row
from unbraid.bench.rows.training_cache import TrainingCache, short, slug
from unbraid.bench.rows.version import base_digest, versions
from unbraid.bench.truth.tasks import Cell, Item, Scale, Task
from unbraid.bench.truth.truths import Truth
from unbraid.common.errors import UsageError
from unbraid.images import sheets
from unbraid.images.crop import open_image
from unbraid.runs.job import RARE
from unbraid.runs.settings import Settings

Use = Literal["content", "style", "both"]
TASKS: tuple[Task, ...] = ("separate", "combine", "recombine")  # `transfer` is left out: it needs pairs of pictures
NEED_TRUTH = (CEILING, "direct sum, tuned")  # rows that use true counterparts
JOINT = "a {rare} {subject} in {style} style"


@dataclass(frozen=True)
class Protocol:
    """How a paper draws: its prompts for each use, pictures per prompt and seed (`draws`), sampling steps and guidance."""

    source: str
    prompts: Mapping[Use, tuple[str, ...]]
    draws: int
    steps: int = 50
    guidance: float = 5.0  # the default of diffusers' SDXL pipeline, because the papers do not give theirs
    note: str = ""  # what the source leaves open and was chosen here


PROTOCOLS = {
    "plain": Protocol(
        "K-LoRA (arXiv 2502.18461), NP-LoRA (2511.11051), ZipLoRA (2311.13600), B-LoRA (2403.14572): the joint prompt alone",
        {
            "content": ("a {rare} {subject}",),
            "style": ("a dog in {style} style", "a house in {style} style"),
            "both": (JOINT,),
        },
        draws=10,
        note="Ten pictures of a pair are K-LoRA's and NP-LoRA's, fifty steps ZipLoRA's. The subjects for the style prompts are chosen here.",
    ),
    "contexts": Protocol(
        "UnZipLoRA (arXiv 2412.04465): each LoRA alone, both, and both in another place",
        {
            "content": ("a photo of {rare} {subject} on a table",),
            "style": ("a dog in {style} style",),
            "both": (JOINT, "a {rare} {subject} on a skateboard in {style} style"),
        },
        draws=4,
        note="The prompts are those of its public examples. The paper's own prompts, and how many pictures, are not known.",
    ),
}


@dataclass(frozen=True)
class Selection:
    """The part of the benchmark to run: tasks and rows by name (empty: all that need no true counterparts), and seeds."""

    tasks: Sequence[str] = ()
    rows: Sequence[str] = ()
    seeds: Sequence[int] = (0,)


def protocol(
    work: Path,
    base: str,
    images: Path,
    models: FieldModels,
    *,
    name: str = "plain",
    selection: Selection | None = None,
    training: Mapping[str, Settings] | None = None,
    parts: str = "",
) -> Iterator[Done]:
    """Yields every unit when it is finished; `unbraid.bench.field.report` shows them. `images`: a folder with the layout that
    `unbraid.bench.field.given` describes. `training`: method → settings that replace its own. `parts`: what a transformer's single
    file lacks, as for `unbraid.bases.base.load`.

    A UsageError in one unit is yielded as its `Done.error`; the other units go on."""
    rules, given, selection = _protocol(name), read_given(images), selection or Selection()
    scale = Scale((), draws=rules.draws, steps=rules.steps, guidance=rules.guidance, training=training or {})
    cache = TrainingCache(work, scale, base, subjects=given.contents, partners=given.partners, parts=parts)
    rows = chosen_rows(selection.tasks, selection.rows)
    for cell in cells(given, selection.seeds):
        for row in (row for row in rows if row.task == cell.task):
            todo = Todo(work, scale, base, row.name, cell)
            try:
                yield Done(todo, _unit(cache, given, rules, models, row, cell))
            except UsageError as error:
                yield Done(todo, None, str(error))


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise UsageError(f"there is no protocol {name!r}", "protocol", f"There are: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def chosen_rows(tasks: Sequence[str] = (), names: Sequence[str] = ()) -> list[Row]:
    """The benchmark's rows without those that need true counterparts or pairs of pictures. UsageError if one of these is named."""
    rows = [row for row in chosen(tasks, names) if row.task in TASKS and row.name not in NEED_TRUTH]
    if lost := set(names) - {row.name for row in rows}:
        fix = "Leave it out, or run the benchmark on the embedded base."
        raise UsageError("this row needs true counterparts or pairs of pictures", sorted(lost)[0], fix)
    return rows


def cells(given: Given, seeds: Sequence[int]) -> Iterator[Cell]:
    """Seed by seed: each style's picture separated, each subject combined with each style, and the subject of each style's picture
    recombined with each other style."""
    for seed in seeds:
        for some in given.styles.values():
            yield Cell("separate", some[0], some[0], seed)
        for contents in given.contents.values():
            for some in given.styles.values():
                yield Cell("combine", contents[0], some[0], seed)
        for one in given.styles.values():
            for other in given.styles.values():
                if one is not other:
                    yield Cell("recombine", one[0], other[0], seed)


def items(cell: Cell, rules: Protocol) -> list[Item]:
    """Everything that is to be drawn in a cell."""
    uses: tuple[Use, ...] = ("content", "style", "both") if cell.task == "separate" else ("both",)
    words = {"rare": RARE, "subject": cell.subject, "style": cell.style.style}
    seeds = tuple(range(cell.seed * rules.draws, (cell.seed + 1) * rules.draws))
    truth = Truth(cell.subject, cell.style.style)
    return [Item(use, prompt.format(**words), truth, {}, seeds) for use in uses for prompt in rules.prompts[use]]


def references(given: Given, cell: Cell, use: str) -> dict[str, list[Path]]:
    """The pictures that a drawing is compared with, as `contents` and `styles`. A drawing of the content alone is not compared with the
    style's pictures, nor one of the style alone with the content's."""
    contents = given.contents[cell.subject] if cell.task == "combine" else (cell.content,)
    some = {"content": contents, "style": given.styles[cell.style.style]}
    return {
        f"{role}s": [truth.file for truth in truths if truth.file]
        for role, truths in some.items()
        if use in (role, "both")
    }


def unit_file(cache: TrainingCache, given: Given, rules: Protocol, row: Row, cell: Cell) -> Path:
    """A unit's file. The name of its folder contains a hash of everything that its drawings depend on."""
    drawn = [[item.use, item.prompt, item.seeds] for item in items(cell, rules)]
    own = (row.task, row.name, row.version, dict(row.settings), versions(row.methods), str(cell), given.hashes(cell))
    scale = {method: dict(settings) for method, settings in cache.scale.training.items()}
    key = short(own, drawn, rules.steps, rules.guidance, scale, base_digest(cache.base_name))
    return cache.work / "units" / f"{slug(f'{cell.task} {row.name} {cell}')[:80]}-{key}" / "unit.json"


def _unit(cache: TrainingCache, given: Given, rules: Protocol, models: FieldModels, row: Row, cell: Cell) -> Unit:
    """A finished unit, read from its file. It is drawn if the file is missing, and scored if other models scored it."""
    file, measured_with = unit_file(cache, given, rules, row, cell), json.dumps(models.names())
    if file.exists():
        (unit,) = results.read(file)
        if unit.made["models"] == measured_with:
            return unit
    else:
        unit = _drawn(cache, rules, row, cell, file)
    scored = []
    for use, prompt in dict.fromkeys((one.use, one.prompt) for one in unit.drawings):
        some = [one for one in unit.drawings if (one.use, one.prompt) == (use, prompt)]
        scored += _scored(cache.work, some, references(given, cell, use), models)
    made = {"base": base_digest(cache.base_name), "models": measured_with}
    unit = replace(unit, drawings=tuple(scored), made=made)
    results.write(unit, file)
    return results.read(file)[0]  # with rounded figures, as a later run will read them


def _drawn(cache: TrainingCache, rules: Protocol, row: Row, cell: Cell, file: Path) -> Unit:
    cache.spent()
    drawers = row.make(cache, cell, row.settings)
    cost, drawings = cache.spent(), []
    for item in items(cell, rules):
        if item.use not in drawers:
            continue
        for seed in item.seeds:  # one at a time: a batch may not fit into memory beside a large base
            (image,) = drawers[item.use](item, (seed,))
            path = sheets.save_image(image, file.with_name(f"{len(drawings):03d}.png"))
            where = str(path.relative_to(cache.work))
            drawings.append(Drawing(item.use, item.prompt, cell.subject, cell.style.style, seed, where, {}))
    return Unit(file.parent.name, cell.task, row.name, str(cell), cell.seed, tuple(drawings), None, cost, {})


def _scored(
    work: Path, drawings: Sequence[Drawing], files: Mapping[str, Sequence[Path]], models: FieldModels
) -> list[Drawing]:
    """Drawings of one prompt with their scores. `files`: what they are compared with. All get the same diversity, which is the prompt's."""
    images = [open_image(work / drawing.file) for drawing in drawings]
    compared = {role: [open_image(path) for path in paths] for role, paths in files.items()}
    prompts = [drawing.prompt.replace(f"{RARE} ", "") for drawing in drawings]  # to CLIP the rare token means nothing
    columns, spread = measure(models, images, prompts, **compared), diversity(models, images)
    return [
        replace(drawing, scores={**{name: values[i] for name, values in columns.items()}, **spread})
        for i, drawing in enumerate(drawings)
    ]
