"""The benchmark's rows on a user's own base and pictures, drawn under the papers' prompts and scored with the field's metrics.

A unit is one row on one content and style with one seed. It appears all at once when it is finished: killed at any moment and
started again, nothing finished is done twice. Its drawings do not depend on the measuring models: with other models they are
scored anew and not drawn anew.
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
from unbraid.bench.rows import CEILING, Row
from unbraid.bench.shop import Shop, short, slug
from unbraid.bench.truth.tasks import Cell, Item, Scale, Task
from unbraid.bench.truth.world import Truth
from unbraid.bench.version import base_digest, versions
from unbraid.common.errors import UsageError
from unbraid.images import sheets as pictures
from unbraid.images.crop import open_image
from unbraid.runs.job import RARE
from unbraid.runs.settings import Settings

Use = Literal["content", "style", "both"]
TASKS: tuple[Task, ...] = (
    "separate",
    "combine",
    "recombine",
)  # `transfer` needs pairs of pictures, and takes them by name
NEED_TRUTH = (CEILING, "direct sum, tuned")  # rows that look at true counterparts
JOINT = "a {rare} {subject} in {style} style"


@dataclass(frozen=True)
class Protocol:
    """How a paper draws: the prompts of each use, pictures per prompt and seed, sampling steps and guidance."""

    source: str
    prompts: Mapping[Use, tuple[str, ...]]
    draws: int
    steps: int = 50
    guidance: float = 5.0  # of the pipeline, where papers are silent
    note: str = ""  # what the source does not say and is chosen here


PROTOCOLS = {
    "plain": Protocol(
        "K-LoRA (arXiv 2502.18461), NP-LoRA (2511.11051), ZipLoRA (2311.13600), B-LoRA (2403.14572): the joint prompt alone",
        {
            "content": ("a {rare} {subject}",),
            "style": ("a dog in {style} style", "a house in {style} style"),
            "both": (JOINT,),
        },
        draws=10,
        note="Ten pictures of a pair are K-LoRA's and NP-LoRA's, fifty steps ZipLoRA's. What a style is drawn on is chosen here.",
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


def protocol(
    work: Path,
    base: str,
    images: Path,
    models: FieldModels,
    *,
    name: str = "plain",
    tasks: Sequence[str] = (),
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    training: Mapping[str, Settings] | None = None,
) -> Iterator[Done]:
    """Every unit, as it comes; `unbraid.bench.field.report` shows them. `images`: a folder as `unbraid.bench.field.given` describes it.
    `tasks`, `rows`: by name; default all that need no true counterpart. `training`: method → settings in place of its own.

    What a user can mend fails one unit (`Done.error`), not the rest."""
    way, given = _protocol(name), read_given(images)
    scale = Scale((), draws=way.draws, steps=way.steps, guidance=way.guidance, training=training or {})
    shop = Shop(work, scale, base, subjects=given.contents, partners=given.partners)
    some = chosen_rows(tasks, rows)
    for cell in cells(given, seeds):
        for row in (row for row in some if row.task == cell.task):
            todo = Todo(work, scale, base, row.name, cell)
            try:
                yield Done(todo, _unit(shop, given, way, models, row, cell))
            except UsageError as error:
                yield Done(todo, None, str(error))


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise UsageError(f"there is no protocol {name!r}", "protocol", f"There are: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def chosen_rows(tasks: Sequence[str] = (), names: Sequence[str] = ()) -> list[Row]:
    """The benchmark's rows, without those that look at true counterparts or need pairs of pictures."""
    rows = [row for row in chosen(tasks, names) if row.task in TASKS and row.name not in NEED_TRUTH]
    if lost := set(names) - {row.name for row in rows}:
        fix = "Leave it out, or run the benchmark on the embedded base."
        raise UsageError("this row needs true counterparts or pairs of pictures", sorted(lost)[0], fix)
    return rows


def cells(given: Given, seeds: Sequence[int]) -> Iterator[Cell]:
    """Seed by seed: each style's picture taken apart, each subject in each style, and each style picture's subject in each other
    style."""
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


def items(cell: Cell, way: Protocol) -> list[Item]:
    """What is drawn in a cell."""
    uses: tuple[Use, ...] = ("content", "style", "both") if cell.task == "separate" else ("both",)
    words = {"rare": RARE, "subject": cell.subject, "style": cell.style.style}
    seeds = tuple(range(cell.seed * way.draws, (cell.seed + 1) * way.draws))
    truth = Truth(cell.subject, cell.style.style)
    return [Item(use, prompt.format(**words), truth, {}, seeds) for use in uses for prompt in way.prompts[use]]


def references(given: Given, cell: Cell, use: str) -> dict[str, list[Path]]:
    """The pictures that a drawing is compared with. What a use is not about has none: a content LoRA alone owes nothing to the style."""
    contents = given.contents[cell.subject] if cell.task == "combine" else (cell.content,)
    some = {"content": contents, "style": given.styles[cell.style.style]}
    return {
        f"{role}s": [truth.file for truth in truths if truth.file]
        for role, truths in some.items()
        if use in (role, "both")
    }


def unit_file(shop: Shop, given: Given, way: Protocol, row: Row, cell: Cell) -> Path:
    """Where a unit is. Its name is a hash of everything that its drawings depend on."""
    asked = [[item.use, item.prompt, item.seeds] for item in items(cell, way)]
    own = (row.task, row.name, row.version, dict(row.settings), versions(row.methods), str(cell), given.hashes(cell))
    scale = {method: dict(settings) for method, settings in shop.scale.training.items()}
    key = short(own, asked, way.steps, way.guidance, scale, base_digest(shop.base_name))
    return shop.work / "units" / f"{slug(f'{cell.task} {row.name} {cell}')[:80]}-{key}" / "unit.json"


def _unit(shop: Shop, given: Given, way: Protocol, models: FieldModels, row: Row, cell: Cell) -> Unit:
    """A unit from its file, drawn or scored first where that is still to do."""
    file, told = unit_file(shop, given, way, row, cell), json.dumps(models.names())
    if file.exists():
        (unit,) = results.read(file)
        if unit.made["models"] == told:
            return unit
    else:
        unit = _drawn(shop, way, row, cell, file)
    scored = []
    for use, prompt in dict.fromkeys((one.use, one.prompt) for one in unit.drawings):
        some = [one for one in unit.drawings if (one.use, one.prompt) == (use, prompt)]
        scored += _scored(shop.work, some, references(given, cell, use), models)
    made = {"base": base_digest(shop.base_name), "models": told}
    unit = replace(unit, drawings=tuple(scored), made=made)
    results.write(unit, file)
    return results.read(file)[0]  # as a later run will find it, to the same place


def _drawn(shop: Shop, way: Protocol, row: Row, cell: Cell, file: Path) -> Unit:
    shop.spent()
    hands = row.make(shop, cell, row.settings)
    cost, drawings = shop.spent(), []
    for item in items(cell, way):
        if item.use not in hands:
            continue
        for seed in item.seeds:  # one by one: several at once do not fit beside a large base
            (image,) = hands[item.use](item, (seed,))
            path = pictures.save_image(image, file.with_name(f"{len(drawings):03d}.png"))
            where = str(path.relative_to(shop.work))
            drawings.append(Drawing(item.use, item.prompt, cell.subject, cell.style.style, seed, where, {}))
    return Unit(file.parent.name, cell.task, row.name, str(cell), cell.seed, tuple(drawings), None, cost, {})


def _scored(
    work: Path, drawings: Sequence[Drawing], told: Mapping[str, Sequence[Path]], models: FieldModels
) -> list[Drawing]:
    """Drawings of one prompt with their scores; diversity is the prompt's, so all have the same."""
    images = [open_image(work / drawing.file) for drawing in drawings]
    known = {role: [open_image(path) for path in paths] for role, paths in told.items()}
    prompts = [drawing.prompt.replace(f"{RARE} ", "") for drawing in drawings]  # CLIP knows no rare token
    columns, spread = measure(models, images, prompts, **known), diversity(models, images)
    return [
        replace(drawing, scores={**{name: values[i] for name, values in columns.items()}, **spread})
        for i, drawing in enumerate(drawings)
    ]
