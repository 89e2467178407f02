"""Does a pair teach a style? Styles that the base has never seen are learnt from pairs of one subject and applied to twenty
others; the judge compares with what the artists really drew, and edges with what the base drew without the style.

    python -m unbraid.bench.pair_study --work DIR                          # hours on a CPU; resumable
    python -m unbraid.bench.pair_study --work DIR --report --sheets OUT    # tables, sheets and the plot from what is there
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from unbraid import pictures
from unbraid.api import learn_job, pair_job
from unbraid.base import Base, load
from unbraid.bases.recipe.filters import HELD_OUT_FILTERS
from unbraid.bench.art import known_art, to_image
from unbraid.bench.figures import harmonic, with_error
from unbraid.bench.judge import Judge, load_judge, similarity
from unbraid.data import alignment
from unbraid.job import RARE
from unbraid.render import Use, render
from unbraid.run import run

TAUGHT, OTHERS = known_art().names[:4], known_art().names[4:]  # pairs are of the first; the others are drawn
SEEDS = (0, 1)
GUIDANCE = 4.0
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
LABELS = {
    "Pair": "style guidance",
    "Pair, LoRA scale": "LoRA scale",
    "DreamBooth-LoRA of the picture after": "DreamBooth-LoRA",
    "Concept Slider": "slider",
}
SWEPT = tuple(LABELS)


@dataclass(frozen=True)
class Look:
    """A style that the base has never seen: the set and the words of the picture before, and of the picture after, which is
    another set or a filter of the picture before."""

    before: str
    words: str
    after: str
    style: str

    def pair(self, subject: str) -> tuple[Tensor, Tensor]:
        """Both `[3, h, w]` in 0..1."""
        before = known_art().picture(subject, self.before)
        if self.after in HELD_OUT_FILTERS:
            return before, HELD_OUT_FILTERS[self.after](before[None]).expand(1, 3, -1, -1)[0]
        return before, known_art().picture(subject, self.after)


LOOKS = {
    "stencil": Look("fluent-emoji-flat", "minimal", "fluent-emoji-high-contrast", "stencil"),
    "pencil": Look("noto", "cartoon", "pencil", "pencil"),
    "thermal": Look("fluent-emoji-flat", "minimal", "thermal", "thermal"),
}


@dataclass(frozen=True)
class Way:
    """A row of the table: how the style is learnt, from how many pairs, and how it is applied. Strengths were chosen on
    another style (docs/LOG.md)."""

    method: str = "pair"
    settings: Mapping[str, Any] | None = None
    pairs: int = 1
    guided: bool = True  # by style guidance; else at LoRA scale, under the style's words
    strength: float = 0.75


WAYS = {
    "Pair": Way(),
    "Pair, LoRA scale": Way(guided=False),
    "Pair, 2 pairs": Way(pairs=2),
    "Pair, 4 pairs": Way(pairs=4),
    "Pair, not orthogonal": Way(settings={"orthogonal": False}),
    "Pair, without the content adapter": Way(settings={"joint": False}),
    "DreamBooth-LoRA of the picture after": Way("dreambooth", guided=False, strength=1.0),
    "Concept Slider": Way("slider", guided=False),
}
BASE = "base alone"


def trained(work: Path, name: str, look: Look, seed: int) -> Path:
    """The style LoRA of a row. Rows that differ in use alone share it."""
    way = WAYS[name]
    key = next(other for other, one in WAYS.items() if (one.method, one.settings, one.pairs) == _training(way))
    folder = work / "loras" / f"{_slug(key)}-{look.style}-{seed}"
    before, after = (work / "inputs" / f"{look.style}-{way.pairs}" / side for side in ("before", "after"))
    for subject in TAUGHT[: way.pairs]:
        for side, values in zip((before, after), look.pair(subject), strict=True):
            if not (side / f"{subject}.png").exists():
                pictures.save_image(to_image(values), side / f"{subject}.png")
        (before / f"{subject}.txt").write_text(subject)
    options = {"out": folder, "seed": seed, "previews": 0, **(way.settings or {})}
    if way.method == "dreambooth":
        prompt = f"a {RARE} {TAUGHT[0]} in {look.style} style"
        job, file = learn_job(after / f"{TAUGHT[0]}.png", prompt=prompt, **options), folder / "lora.safetensors"
    else:
        job = pair_job(before, after, subject=TAUGHT[0], style=look.style, method=way.method, **options)
        file = folder / "style.safetensors"
    if not file.exists():
        for _ in run(job, resume=(folder / "run.toml").exists()):
            pass
    return file


def draw(
    name: str, file: Path | None, look: Look, subject: str, seed: int, strength: float | None = None
) -> Image.Image:
    """The subject, from the prompt that the base knows it by, with the style of `file`."""
    way, prompt = WAYS.get(name, Way()), f"a {subject} in {look.words} style"
    strength = way.strength if strength is None else strength
    uses, styles = (), ()
    if file and way.guided:
        styles = (Use(file, strength, prompt=look.style),)
    elif file:
        uses = (Use(file, strength),)
        prompt = prompt if way.method == "slider" else f"{prompt} in {look.style} style"
    (image,) = render(base(), prompt, uses, styles=styles, guidance=GUIDANCE, seeds=(seed,))
    return image


@cache
def base() -> Base:
    return load()


def study(work: Path, only: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Train and draw everything that is not there yet."""
    for seed in seeds:
        for look in LOOKS.values():
            for name in (BASE, *only):
                file = None if name == BASE else trained(work, name, look, seed)
                for subject in OTHERS:
                    where = _drawn(work, name, look, seed) / f"{subject}.png"
                    if not where.exists():
                        pictures.save_image(draw(name, file, look, subject, seed), where)
                print(f"{name}: {look.style}, seed {seed}", flush=True)
    for name in (one for one in SWEPT if one in only):  # one subject in four is enough for a curve
        for look in LOOKS.values():
            for strength in STRENGTHS:
                for subject in OTHERS[::4]:
                    where = work / "sweep" / _slug(name) / look.style / f"{strength:g}" / f"{subject}.png"
                    if not where.exists():
                        file = trained(work, name, look, SEEDS[0])
                        pictures.save_image(draw(name, file, look, subject, SEEDS[0], strength), where)


def scores(judge: Judge, folder: Path, plain: Path, look: Look, subjects: tuple[str, ...]) -> list[dict[str, float]]:
    """Per subject: the judge's cosine to the true counterpart in style and in content, edges' correlation with the picture
    drawn without the style, and the content cosine to the subject that was taught."""
    if not all((folder / f"{subject}.png").exists() for subject in subjects):
        return []
    drawn = [Image.open(folder / f"{subject}.png").convert("RGB") for subject in subjects]
    values = torch.stack([torch.from_numpy(np.asarray(one, np.float32) / 255).permute(2, 0, 1) for one in drawn])
    truth = torch.stack([look.pair(subject)[1] for subject in (*subjects, TAUGHT[0])])
    (content, style), (true_content, true_style) = judge.embed(values), judge.embed(truth)
    return [
        {
            "style": float(similarity(style[i : i + 1], true_style[i : i + 1])),
            "content": float(similarity(content[i : i + 1], true_content[i : i + 1])),
            "structure": alignment(Image.open(plain / f"{subject}.png"), drawn[i]),
            "leak": float(similarity(content[i : i + 1], true_content[-1:])),
        }
        for i, subject in enumerate(subjects)
    ]


COLUMNS = ("style", "structure", "content", "leak")


def report(work: Path) -> str:
    """Three tables: every way over all styles, the harmonic means of style and structure by style and seed, and style over strength."""
    judge = load_judge()
    lines = [f"| | {' | '.join(COLUMNS)} | style × structure | pictures |", "|---" * (len(COLUMNS) + 3) + "|"]
    by_style = [f"| | {' | '.join(LOOKS)} |", "|---" * (len(LOOKS) + 1) + "|"]
    for name in (BASE, *WAYS):
        cells = {
            (look.style, seed): scores(
                judge, _drawn(work, name, look, seed), _drawn(work, BASE, look, seed), look, OTHERS
            )
            for look in LOOKS.values()
            for seed in SEEDS
        }
        if rows := [row for some in cells.values() for row in some]:
            values = [with_error([row[column] for row in rows]) for column in COLUMNS]
            lines.append(f"| {name} | {' | '.join(values)} | **{_mean(rows):.3f}** | {len(rows)} |")
            seeds = [" / ".join(f"{_mean(cells[style, seed]):.3f}" for seed in SEEDS) for style in LOOKS]
            by_style.append(f"| {name} | {' | '.join(seeds)} |")
    true = [
        alignment(to_image(before), to_image(after))
        for look in LOOKS.values()
        for before, after in map(look.pair, OTHERS)
    ]
    lines.append(f"| the artists' own pairs | 1 | {with_error(true)} | 1 | | | {len(true)} |")
    strengths = ["| style at strength | " + " | ".join(f"{one:g}" for one in STRENGTHS) + " |", "|---" * 8 + "|"]
    for look in LOOKS.values():
        for name, label in LABELS.items():
            strengths.append(
                f"| {look.style}, {label} | {' | '.join(f'{x:.2f}' for x in _curve(work, name, look)['style'])} |"
            )
    return "\n".join([*lines, "", *by_style, "", *strengths])


def _mean(rows: list[dict[str, float]]) -> float:
    """The harmonic mean of mean style and mean structure."""
    if not rows:
        return float("nan")
    style, structure = (statistics.mean(row[column] for row in rows) for column in COLUMNS[:2])
    return harmonic(style, structure)


@cache
def _curve(work: Path, name: str, look: Look) -> dict[str, list[float]]:
    """Column → its mean at every strength; NaN where nothing is drawn."""
    plain, subjects = _drawn(work, BASE, look, SEEDS[0]), OTHERS[::4]
    folders = [work / "sweep" / _slug(name) / look.style / f"{strength:g}" for strength in STRENGTHS]
    rows = [scores(load_judge(), folder, plain, look, subjects) for folder in folders]
    return {
        what: [statistics.mean(one[what] for one in some) if some else float("nan") for some in rows]
        for what in COLUMNS
    }


def sweep_plot(work: Path, out: Path) -> Path:
    """Style and content over strength, a column per style: the paper's claim in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(LOOKS), 5.2), layout="constrained")
    axes = figure.subplots(2, len(LOOKS), sharex=True, sharey="row", squeeze=False)
    for column, look in enumerate(LOOKS.values()):
        for row, what in enumerate(("style", "content")):
            for name, label in LABELS.items():
                values = _curve(work, name, look)[what]
                axes[row, column].plot(STRENGTHS, values, marker="o", markersize=3, label=label)
            axes[row, column].set_ylabel(f"{what}: cosine to the truth" if not column else "")
            axes[row, column].grid(alpha=0.3)
        axes[0, column].set_title(look.style, fontsize=10)
        axes[1, column].set_xlabel("strength")
    axes[0, 0].legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return out


def sheet(work: Path, look: Look, out: Path) -> Path:
    """A row per way, a column per subject, under the base's own drawings and the true counterparts."""
    subjects = OTHERS[:10]
    before, after = look.pair(TAUGHT[0])
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = [
        ("the pair", [("before", to_image(before)), ("after", to_image(after))]),
        ("what the artists drew", [(subject, to_image(look.pair(subject)[1])) for subject in subjects]),
    ]
    for name in (BASE, *WAYS):
        files = [_drawn(work, name, look, SEEDS[0]) / f"{subject}.png" for subject in subjects]
        if all(file.exists() for file in files):
            rows.append((name, [("", Image.open(file)) for file in files]))
    return pictures.save_image(pictures.contact_sheet(rows, cell=80), out)


def _training(way: Way) -> tuple[str, Mapping[str, Any] | None, int]:
    return way.method, way.settings, way.pairs


def _drawn(work: Path, name: str, look: Look, seed: int) -> Path:
    return work / "drawn" / _slug(name) / f"{look.style}-{seed}"


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def main(
    work: Annotated[Path, typer.Option(help="Folder for LoRAs and drawings; reuse it to resume.")],
    only: Annotated[list[str] | None, typer.Option(help="Rows; default all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; default all.")] = None,
    just_report: Annotated[bool, typer.Option("--report", help="Print the table of what is there.")] = False,
    sheets: Annotated[Path | None, typer.Option(help="Write a sheet per style and the plot here.")] = None,
) -> None:
    if not just_report:
        study(work, tuple(only or WAYS), tuple(seed or SEEDS))
    print(report(work))
    if sheets:
        for name, look in LOOKS.items():
            sheet(work, look, sheets / f"{name}.webp")
        sweep_plot(work, sheets / "strength.png")


if __name__ == "__main__":
    typer.run(main)
