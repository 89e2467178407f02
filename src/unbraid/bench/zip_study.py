"""Does zipping help? LoRAs of held-out subjects and of styles (each from one picture) are put together in every way that
unbraid knows, and the judge compares what they draw with the true counterpart: that subject in that style.

    python -m unbraid.bench.zip_study --work DIR            # hours on a CPU; resumable; one process per --seed if you like
    python -m unbraid.bench.zip_study --work DIR --report   # tables and sheet from what is there
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from unbraid import pictures
from unbraid.api import learn_job, split_job, zip_job
from unbraid.bases.recipe.subjects import TRAIN_SETS
from unbraid.bench.art import held_out_art, to_image
from unbraid.bench.counterparts import (
    content_prompt,
    draw,
    inputs,
    joint_prompt,
    made,
    score,
    style_prompt,
    true,
)
from unbraid.bench.figures import harmonic, with_error
from unbraid.bench.judge import Judge, load_judge
from unbraid.combine import Combine
from unbraid.file_tools import Source, merge_files
from unbraid.render import Use

SUBJECTS = ("fox", "guitar", "mushroom", "fish", "owl", "carrot")
STYLES = ("line art", "stencil", "pencil")
TUNING = ("horse", "house")  # subjects on which the direct sum's weights are chosen
WEIGHTS = (0.5, 0.75, 1.0, 1.25)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Way:
    """A row of the table: how two LoRAs become what is loaded together."""

    zip: Mapping[str, Any] | None = None  # settings of `unbraid zip`
    images: bool = True  # the training pictures are at hand; else the LoRAs draw their own
    merge: str = ""  # a method of `unbraid merge`
    combine: Combine = "sum"
    lora: str = "lora"  # which LoRAs: those of learn, or of split's B-LoRA
    tuned: bool = False
    alone: bool = False  # there are two LoRAs afterwards, each of which should still draw its own


WAYS = {
    "direct sum (1, 1)": Way(alone=True),
    "direct sum, weights tuned on other pairs": Way(tuned=True),
    "ZipRank": Way({}, alone=True),
    "ZipLoRA": Way({"granularity": "column"}, alone=True),
    "ZipLoRA, data-free": Way({"granularity": "column"}, images=False, alone=True),
    "ZipLoRA, the paper's rate": Way({"granularity": "column", "lr": 0.01}, alone=True),
    "ZipLoRA, public recipe": Way({"compat": "official"}, alone=True),
    "ZipLoRA, dot": Way({"granularity": "column", "similarity": "dot", "lr": 0.01}, alone=True),
    "ZipLoRA, product": Way({"granularity": "column", "similarity": "product", "lr": 0.01}, alone=True),
    "B-LoRA": Way(lora="blora", alone=True),
    "NP-LoRA": Way(merge="np-lora"),
    "K-LoRA": Way(combine="k-lora"),
    "LoRA Switch": Way(combine="switch"),
    "LoRA Composite": Way(combine="composite"),
}
BASE, PLAIN = "base alone", "direct sum (1, 1)"
OTHER = "dog"  # what a style LoRA draws when it is alone


def learnt(work: Path, way: Way, subject: str, style: str, seed: int) -> tuple[Path, Path]:
    """The two LoRAs that everything starts from."""
    out = []
    for name, role in ((subject, "content"), (style, "style")):
        files = inputs(work, name if role == "content" else None, name)
        prompt = content_prompt(name) if role == "content" else style_prompt(name)
        folder = work / "loras" / f"{name.replace(' ', '-')}-{way.lora}-{seed}"
        common = {"out": folder, "seed": seed, "previews": 0}
        if way.lora == "blora":
            words = {"subject": subject, "style": style}  # its own prompt names neither
            job, file = split_job(files[0], **words, method="blora", **common), folder / f"{role}.safetensors"
        else:
            job, file = learn_job(files, prompt=prompt, **common), folder / "lora.safetensors"
        out.append(made(job, file))
    return out[0], out[1]


def together(work: Path, name: str, subject: str, style: str, seed: int) -> tuple[tuple[Use, ...], tuple[Use, ...]]:
    """What one way loads for the two in one picture; and for each alone, if it has files for that."""
    way = WAYS[name]
    content, own = learnt(work, way, subject, style, seed)
    folder = work / name.replace(" ", "-") / f"{subject}-{style.replace(' ', '-')}-{seed}"
    if way.zip is not None:
        images = {"content": inputs(work, subject, None)[0].parent, "style": inputs(work, None, style)[0]}
        job = zip_job(
            content,
            own,
            images=images if way.images else None,
            prompts={"both": joint_prompt(subject, style)},
            out=folder,
            seed=seed,
            previews=0,
            **way.zip,
        )
        content, own = (
            made(job, folder / "content.safetensors").with_name("content.safetensors"),
            folder / "style.safetensors",
        )
    if way.merge:
        merged = folder / "merged.safetensors"
        if not merged.exists():
            merge_files([Source(content), Source(own)], merged, way.merge)
        return (Use(merged),), ()
    a, b = tuned_weights(work, seed) if way.tuned else (1.0, 1.0)
    both = (Use(content, a), Use(own, b))
    return both, both if way.alone else ()


@cache
def tuned_weights(work: Path, seed: int) -> tuple[float, float]:
    """The weights of the direct sum with the best harmonic mean on pairs that are not in the table."""
    file = work / f"weights-{seed}.txt"
    if not file.exists():
        judge, best = load_judge(), (0.0, 1.0, 1.0)
        for a, b in product(WEIGHTS, WEIGHTS):
            rows = []
            for subject, style in product(TUNING, STYLES):
                content, own = learnt(work, WAYS[PLAIN], subject, style, seed)
                drawn = draw(joint_prompt(subject, style), (Use(content, a), Use(own, b)), "sum", seed)
                rows.append(score(judge, drawn, true(subject, style)))
            best = max(best, (statistics.mean(harmonic(*row) for row in rows), a, b))
        file.write_text(f"{best[1]} {best[2]}")
    a, b = (float(word) for word in file.read_text().split())
    return a, b


def cells(seeds: tuple[int, ...] = SEEDS) -> Iterator[tuple[str, str, int]]:
    yield from product(SUBJECTS, STYLES, seeds)


def study(work: Path, only: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Learn, put together and draw everything that is not there yet."""
    for subject, style, seed in cells(seeds):
        for name in only:
            folder, way = _folder(work, name, subject, style, seed), WAYS.get(name, Way())
            if (folder / "both.png").exists():
                continue
            both, alone = ((), ()) if name == BASE else together(work, name, subject, style, seed)
            todo = {"both": (joint_prompt(subject, style), both)}
            if alone or name == BASE:
                content = (content_prompt(subject), alone[:1])
                todo = {"content": content, "style": (f"a {OTHER} in {style} style", alone[1:]), **todo}
            for use, (prompt, uses) in todo.items():
                image = draw(prompt, uses, way.combine if use == "both" else "sum", seed)
                pictures.save_image(image, folder / f"{use}.png")
            print(f"{name}: {subject}, {style}, seed {seed}", flush=True)


def _folder(work: Path, name: str, subject: str, style: str, seed: int) -> Path:
    return work / "drawn" / name.replace(" ", "-") / f"{subject}-{style.replace(' ', '-')}-{seed}"


def report(work: Path, seeds: tuple[int, ...] = SEEDS) -> str:
    """Two tables: both LoRAs in one picture against the true counterpart, and each alone against its own concept. The lead is
    the harmonic mean's over the plain sum's of the same pair and seed."""
    judge = load_judge()
    joint = ["| together | content | style | harmonic mean | lead over the plain sum | pictures |", "|---" * 6 + "|"]
    alone = ["| alone | subject LoRA: content | style LoRA: style | pictures |", "|---" * 4 + "|"]
    plain: dict[tuple[str, str, int], float] = {}
    for name in (BASE, *WAYS):
        rows, own = {}, []
        for cell in cells(seeds):
            folder = _folder(work, name, *cell)
            if not (folder / "both.png").exists():
                continue
            rows[cell] = score(judge, Image.open(folder / "both.png"), true(*cell[:2]))
            if (folder / "content.png").exists():
                own.append(_alone(judge, folder, *cell[:2]))
        full = {cell: (c, s, harmonic(c, s)) for cell, (c, s) in rows.items()}
        if name == PLAIN:
            plain = {cell: row[-1] for cell, row in full.items()}
        leads = [row[-1] - plain[cell] for cell, row in full.items() if cell in plain and name != PLAIN]
        if rows:
            values = " | ".join(with_error(list(column)) for column in zip(*full.values(), strict=True))
            joint.append(f"| {name} | {values} | {with_error(leads) if leads else '–'} | {len(rows)} |")
        if own:
            values = " | ".join(with_error(list(column)) for column in zip(*own, strict=True))
            alone.append(f"| {name} | {values} | {len(own)} |")
    return "\n".join([*joint, "", *alone])


def _alone(judge: Judge, folder: Path, subject: str, style: str) -> tuple[float, float]:
    """How well each LoRA still draws its own: the subject, as the artist whom it is nearest to; another subject in the style."""
    drawn = Image.open(folder / "content.png")
    content = max(score(judge, drawn, held_out_art().picture(subject, of))[0] for of in TRAIN_SETS)
    return content, score(judge, Image.open(folder / "style.png"), true(OTHER, style))[1]


def sheet(work: Path, out: Path) -> None:
    """A row per way, a column per pair, at the first seed; the true counterparts first."""
    columns = list(cells(SEEDS[:1]))
    truth = [(f"{subject}, {style}", to_image(true(subject, style))) for subject, style, _ in columns]
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = [("what the artists drew", truth)]
    for name in (BASE, *WAYS):
        files = [_folder(work, name, *one) / "both.png" for one in columns]
        if all(file.exists() for file in files):
            rows.append((name, [("", Image.open(file)) for file in files]))
    pictures.save_image(pictures.contact_sheet(rows, cell=64), out)


def main(
    work: Annotated[Path, typer.Option(help="Folder for LoRAs and drawings; reuse it to resume.")],
    only: Annotated[list[str] | None, typer.Option(help="Rows; default all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; default all.")] = None,
    just_report: Annotated[bool, typer.Option("--report", help="Print the tables of what is there.")] = False,
    out: Annotated[Path | None, typer.Option("--sheet", help="Write a contact sheet here.")] = None,
) -> None:
    if not just_report:
        study(work, tuple(only or (BASE, *WAYS)), tuple(seed or SEEDS))
    print(report(work, tuple(seed or SEEDS)))
    if out:
        sheet(work, out)


if __name__ == "__main__":
    typer.run(main)
