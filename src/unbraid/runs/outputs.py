"""The results of a run: its LoRA files, and pictures to look at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from unbraid.core import mergers
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Lora
from unbraid.files.formats.encode import dialect_for
from unbraid.files.lora_file import write
from unbraid.files.merge import merge
from unbraid.images import sheets
from unbraid.methods import METHODS
from unbraid.methods.entry import Output
from unbraid.runs import folder, pace, showcase
from unbraid.runs.job import Job, metadata
from unbraid.runs.merger_plot import mergers_plot
from unbraid.runs.prepare import GUIDANCE, Ready, source
from unbraid.sampling.sample import classifier_free, generate

SHOWN = 8  # the most input pictures in a row of the sheet


def preview(ready: Ready) -> Path:
    """Draw a preview sheet, one picture per use (see `_uses`), always at the same seed. Returns its file."""
    cells = [(name, images[0]) for name, images in _uses(ready, (0,), pace.PREVIEW_STEPS)]
    sheet = sheets.contact_sheet([(f"step {ready.state.step}", cells)])
    return sheets.save_image(sheet, ready.job.out / "previews" / f"step_{ready.state.step:06d}.png")


def _uses(ready: Ready, seeds: tuple[int, ...], steps: int) -> Iterator[tuple[str, list[Image.Image]]]:
    """Draw with the base alone, with each LoRA alone under its own prompt, and with all together.

    Yields (name of the use, a picture per seed)."""
    if (graphs := ready.run_data.graphs) and (ready.state.step == ready.recipe.steps or ready.base.short_of_memory()):
        graphs.clear()
    outputs = METHODS[ready.job.method].outputs(ready.job.settings).values()
    texts = ready.run_data.encoded
    roles = {name: name if name in texts else output.prompt for output in outputs for name in output.adapters}
    apart = next((branch for branch in ready.recipe.branches(0) if any(one.segment for one in branch.active)), None)
    own = {active.adapter for branch in ready.recipe.branches(0) for active in branch.active if active.prompt}
    uses: dict[str, tuple[str, tuple[Active, ...]]] = {"base alone": ("both", ())}
    uses |= {f"{adapter} alone": (role, (Active(adapter),)) for adapter, role in roles.items()}
    if len(roles) > 1:
        uses["together"] = (
            "both",
            tuple(Active(name, prompt=role if name in own else None) for name, role in roles.items()),
        )
    if apart:
        uses["together"] = (apart.prompt, apart.active)
    for name, (role, active) in uses.items():
        terms = classifier_free(GUIDANCE, role, active)
        some = [seeds] if ready.job.loading.preset.at_once > 1 else [(seed,) for seed in seeds]
        made = [generate(ready.base, terms, texts, ready.adapters, seeds=now, steps=steps) for now in some]
        yield name, [image for images in made for image in images]


def written(ready: Ready, texts: Mapping[str, str]) -> Iterator[Path]:
    """Write the LoRA files, and yield their paths."""
    job = ready.job
    shown = next((ready.images[role][0] for role in job.data.images), None)
    for stem, output in METHODS[job.method].outputs(job.settings).items():
        modules = {
            f"{ready.base.family.network.part}.{name}": lora for name, lora in _folded(ready.adapters, output).items()
        }
        path, family = job.out / f"{stem}.safetensors", ready.base.family.name
        write(
            path,
            modules,
            family=family,
            dialect=dialect_for(modules, family),
            metadata={
                **metadata(job, ready.recipe.steps, stem, texts[output.prompt], texts, shown),
                **ready.base.lora_metadata,
            },
        )
        yield path


def drawings(ready: Ready, texts: Mapping[str, str]) -> dict[str, Callable[[], Path]]:
    """The pictures to make after the LoRAs are written: file name → function that makes it and returns its path."""
    job, out = ready.job, dict[str, Callable[[], Path]]()
    if events := folder.read_events(job.out):
        losses = [event["loss"] for event in events]
        out["loss.png"] = lambda: sheets.loss_plot(losses, job.out / "loss.png")
    part = ready.base.family.network.part
    found = {
        name: {f"{part}.{layer}": value for layer, value in mergers.values(ready.adapters, name).items()}
        for name in ready.adapters.names
    }
    if job.data.loras and any(found.values()):
        out["coefficients.png"] = lambda: mergers_plot(events, found, job.out / "coefficients.png")
    if job.extras.previews:
        out["sheet.png"] = lambda: _sheet(ready, texts)
    return out


def _folded(adapters: Adapters, output: Output) -> dict[str, Lora]:
    """The modules of an output file as plain LoRA factors. Several adapters are merged to their exact sum."""
    parts = [adapters.folded(name, output.gates) for name in output.adapters]
    return parts[0] if len(parts) == 1 else {one.name: one.lora for one in merge(parts, [1.0] * len(parts))}


def _sheet(ready: Ready, texts: Mapping[str, str]) -> Path:
    """Draw the final sheet: the inputs, and every use at four seeds. Returns its file."""
    job = ready.job
    prompts = {
        branch.image: texts.get(branch.prompt, texts["both"])
        for branch in ready.recipe.branches(max(ready.recipe.steps - 1, 0))
    }
    captioned = {role for role, files in job.data.images.items() if all(file in job.data.captions for file in files)}
    rows = [
        (
            "input, under its own prompt" if role in captioned else f"input: {prompts.get(role, role)}",
            list(zip(_labels(job, role, some), some, strict=False))[:SHOWN],
        )
        for role, some in ready.images.items()
    ]
    rows += [
        (name, [(f"seed {i}", image) for i, image in enumerate(images)])
        for name, images in _uses(ready, (0, 1, 2, 3), pace.SHEET_STEPS)
    ]
    rows += [(row.title, _pictures(ready, row)) for row in showcase.rows(job)]
    return sheets.save_image(sheets.contact_sheet(rows), job.out / "sheet.png")


def _pictures(ready: Ready, row: showcase.Row) -> list[tuple[str, Image.Image]]:
    """The pictures of a row of the showcase, each at the same seed."""
    cells = []
    for label, text in row.prompts.items():
        if text in (texts := ready.run_data.encoded):
            terms = classifier_free(GUIDANCE, text, (Active(row.adapter),))
            drawn = generate(ready.base, terms, texts, ready.adapters, seeds=(0,), steps=pace.SHEET_STEPS)
            cells.append((label, drawn[0]))
    return cells


def _labels(job: Job, role: str, images: Sequence[Image.Image]) -> list[str]:
    """The text under each picture: its own prompt, else its file name, else the name of the LoRA that drew it."""
    return [job.data.captions.get(path, path.name) for path in job.data.images.get(role, ())] or [
        f"drawn by {source(job, role).name}"
    ] * len(images)
