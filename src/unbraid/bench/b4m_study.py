"""Do modules hold what they promise? Content and style modules of held-out subjects and styles, each learnt once, are put together in
every combination; the judge compares with the true counterparts, beside other ways to get both into one picture.

    python -m unbraid.bench.b4m_study --work DIR                        # an hour or two on one core; resumable
    python -m unbraid.bench.b4m_study --work DIR --report --sheet FILE  # table and sheet from what is there
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from unbraid import pictures
from unbraid.api import learn_job, zip_job
from unbraid.bases.recipe.filters import TRAIN_FILTERS
from unbraid.bench.art import known_art, to_image
from unbraid.bench.counterparts import (
    STYLES,
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
from unbraid.bench.judge import load_judge
from unbraid.modules import break_job, join, make_job
from unbraid.render import Use

SUBJECTS = ("fox", "guitar", "mushroom", "fish")
PARTNERS = {  # three pictures of the other kind, none of them of a subject or style in the table
    "content": (("dog", "sepia"), ("umbrella", "noir"), ("violin", "risograph")),
    "style": (("dog", ""), ("umbrella", ""), ("violin", "")),
}
SEED = 0
Uses = tuple[Use, ...]


@dataclass(frozen=True)
class Way:
    """A row of the table: how both get into one picture; settings of `break`, and of `make` if it fine-tunes."""

    put: Callable[[Path, str, str, "Way"], Uses]
    settings: Mapping[str, Any] | None = None
    tune: Mapping[str, Any] | None = None


def partners(work: Path, kind: str) -> Path:
    """The folder of a module's partner pictures, with their prompts."""
    folder = work / "inputs" / f"partners-{kind}"
    for subject, look in PARTNERS[kind]:
        picture = known_art().picture(subject, "noto")
        shown = TRAIN_FILTERS[look](picture[None]).expand(1, 3, -1, -1)[0] if look else picture
        if not (folder / f"{subject}.png").exists():
            pictures.save_image(to_image(shown), folder / f"{subject}.png")
        (folder / f"{subject}.txt").write_text(f"a {subject} in {look} style" if look else f"a {subject}")
    return folder


def module(work: Path, kind: str, name: str, settings: Mapping[str, Any]) -> Path:
    """One module, learnt once for all its combinations."""
    told = "-".join(f"{key}={value}" for key, value in settings.items()) or "plain"
    folder = work / "modules" / f"{_slug(name)}-{told}"
    files = inputs(work, name if kind == "content" else None, name)
    prompt = content_prompt(name) if kind == "content" else style_prompt(name)
    options = {"out": folder, "seed": SEED, "previews": 0, **settings}
    job = break_job(files, kind=kind, prompt=prompt, partners=partners(work, kind), **options)  # type: ignore[arg-type]
    return made(job, folder / "module.safetensors")


def modules(work: Path, subject: str, style: str, way: Way) -> Uses:
    content, own = (
        module(work, kind, name, way.settings or {}) for kind, name in (("content", subject), ("style", style))
    )
    out = work / "made" / _key(way) / f"{subject}-{_slug(style)}"
    file = out / "merged.safetensors"
    if file.exists():
        return (Use(file),)
    if way.tune is None:
        return (Use(join(content, own, file)),)
    images = {"content": inputs(work, subject, None)[0].parent, "style": inputs(work, None, style)[0]}
    options = {"fine_tune": 150, "out": out, "seed": SEED, "previews": 0, **way.tune}
    return (Use(made(make_job(content, own, images=images, prompt=joint_prompt(subject, style), **options), file)),)


def loras(work: Path, subject: str, style: str, way: Way) -> Uses:
    """Two DreamBooth-LoRAs; with settings, zipped."""
    files = []
    for name, kind, prompt in ((subject, "content", content_prompt(subject)), (style, "style", style_prompt(style))):
        folder = work / "loras" / _slug(name)
        given = inputs(work, name if kind == "content" else None, name)
        job = learn_job(given, prompt=prompt, out=folder, seed=SEED, previews=0)
        files.append(made(job, folder / "lora.safetensors"))
    if way.settings is not None:
        out = work / "made" / _key(way) / f"{subject}-{_slug(style)}"
        images = {"content": inputs(work, subject, None)[0].parent, "style": inputs(work, None, style)[0]}
        prompts = {"both": joint_prompt(subject, style)}
        job = zip_job(*files, images=images, prompts=prompts, out=out, seed=SEED, previews=0, **way.settings)
        files = [
            made(job, out / "content.safetensors").with_name(f"{role}.safetensors") for role in ("content", "style")
        ]
    return tuple(map(Use, files))


def joint(work: Path, subject: str, style: str, way: Way) -> Uses:
    """One LoRA of both: the subject's pictures and the style's, each under its own prompt."""
    del way
    folder, copies = work / "made" / "joint" / f"{subject}-{_slug(style)}", []
    for kind, prompt in (("content", content_prompt(subject)), ("style", style_prompt(style))):
        files = inputs(work, subject if kind == "content" else None, style)
        for file in files * (4 // len(files)):  # as often the one as the other
            copy = work / "inputs" / "joint" / f"{subject}-{_slug(style)}" / f"{kind}-{len(copies)}.png"
            if not copy.exists():
                pictures.save_image(Image.open(file).convert("RGB"), copy)
            copy.with_suffix(".txt").write_text(prompt)
            copies.append(copy)
    job = learn_job(copies, prompt=joint_prompt(subject, style), out=folder, seed=SEED, previews=0)
    return (Use(made(job, folder / "lora.safetensors")),)


def nothing(work: Path, subject: str, style: str, way: Way) -> Uses:
    del work, subject, style, way
    return ()


BASE = "base alone"
WAYS = {
    BASE: Way(nothing),
    "direct sum of DreamBooth-LoRAs": Way(loras),
    "Break-for-Make, at once": Way(modules),
    "… fine-tuned, Riemannian": Way(modules, tune={}),
    "… fine-tuned, AdamW": Way(modules, tune={"optimizer": "adamw"}),
    "… at once, without partners": Way(modules, {"partner_count": 0}),
    "… at once, no orthonormal start": Way(modules, {"orthogonal": False}),
    "joint training": Way(joint),
    "ZipRank": Way(loras, {}),
    "ZipLoRA": Way(loras, {"granularity": "column"}),
    "… halves that may meet, fine-tuned": Way(modules, {"interaction": True}, {}),
}


def study(work: Path, only: tuple[str, ...]) -> None:
    """Learn, put together and draw everything that is not there yet."""
    for name in only:
        for subject, style in product(SUBJECTS, STYLES):
            folder = _folder(work, name, subject, style)
            if (folder / "both.png").exists():
                continue
            before = _learnt(work)
            began = time.perf_counter()
            uses = WAYS[name].put(work, subject, style, WAYS[name])
            spent = time.perf_counter() - began
            image = draw(joint_prompt(subject, style), uses, "sum", SEED)
            pictures.save_image(image, folder / "both.png")
            if before == _learnt(work):  # the composition's own time alone
                (folder / "seconds.txt").write_text(f"{spent:.2f}")
            print(f"{name}: {subject}, {style}", flush=True)


def report(work: Path) -> str:
    """One row per way; the lead is the harmonic mean's over the direct sum's, pair by pair."""
    judge, plain = load_judge(), dict[tuple[str, str], float]()
    lines = [
        "| | content | style | harmonic mean | lead over the direct sum | s per composition | pictures |",
        "|---" * 7 + "|",
    ]
    for name in WAYS:
        rows, seconds = {}, []
        for cell in product(SUBJECTS, STYLES):
            folder = _folder(work, name, *cell)
            if (folder / "both.png").exists():
                content, style = score(judge, Image.open(folder / "both.png"), true(*cell))
                rows[cell] = (content, style, harmonic(content, style))
            if (folder / "seconds.txt").exists():
                seconds.append(float((folder / "seconds.txt").read_text()))
        if not rows:
            continue
        if name.startswith("direct"):
            plain = {cell: row[-1] for cell, row in rows.items()}
        leads = [row[-1] - plain[cell] for cell, row in rows.items() if cell in plain and not name.startswith("direct")]
        values = " | ".join(with_error(list(column)) for column in zip(*rows.values(), strict=True))
        middle = f"{sorted(seconds)[len(seconds) // 2]:.1f}" if seconds and name != BASE else "–"
        lines.append(f"| {name} | {values} | {with_error(leads) if leads else '–'} | {middle} | {len(rows)} |")
    return "\n".join(lines)


def sheet(work: Path, out: Path) -> None:
    """A row per way, a column per pair."""
    cells = list(product(SUBJECTS, STYLES))
    truth = [(f"{subject}, {style}", to_image(true(subject, style))) for subject, style in cells]
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = [("what the artists drew", truth)]
    for name in WAYS:
        files = [_folder(work, name, *cell) / "both.png" for cell in cells]
        if all(file.exists() for file in files):
            rows.append((name, [("", Image.open(file)) for file in files]))
    pictures.save_image(pictures.contact_sheet(rows, cell=64), out)


def _folder(work: Path, name: str, subject: str, style: str) -> Path:
    return work / "drawn" / _slug(name) / f"{subject}-{_slug(style)}"


def _learnt(work: Path) -> set[Path]:
    return {file for kind in ("modules", "loras") for file in (work / kind).glob("*/*.safetensors")}


def _key(way: Way) -> str:
    return _slug(next(name for name, one in WAYS.items() if one is way))


def _slug(name: str) -> str:
    return name.replace(",", "").replace("…", "b4m").replace(" ", "-")


def main(
    work: Annotated[Path, typer.Option(help="Folder for modules and drawings; reuse it to resume.")],
    only: Annotated[list[str] | None, typer.Option(help="Rows; default all.")] = None,
    just_report: Annotated[bool, typer.Option("--report", help="Print the table of what is there.")] = False,
    out: Annotated[Path | None, typer.Option("--sheet", help="Write a contact sheet here.")] = None,
) -> None:
    if not just_report:
        study(work, tuple(only or WAYS))
    print(report(work))
    if out:
        sheet(work, out)


if __name__ == "__main__":
    typer.run(main)
