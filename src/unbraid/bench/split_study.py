"""Is a split right? Held-out pictures are split, the LoRAs used in three ways, and the judge compares the
results with what the artists really drew.

    python -m unbraid.bench.split_study --work DIR            # hours on a CPU; resumable
    python -m unbraid.bench.split_study --work DIR --report   # table and sheets from what is there
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from unbraid import pictures
from unbraid.api import job
from unbraid.base import Base, load
from unbraid.bases.recipe.subjects import STYLE_WORDS, TRAIN_SETS
from unbraid.bench.art import Art, held_out_art, known_art
from unbraid.bench.figures import harmonic, with_error
from unbraid.bench.judge import Judge, load_judge, similarity
from unbraid.job import RARE
from unbraid.render import Use, render
from unbraid.run import run

SUBJECTS = ("fox", "guitar", "mushroom", "fish")
OTHERS = ("dog", "umbrella", "violin", "strawberry")  # what a style LoRA draws
SETS = ("openmoji", "fluent-emoji-high-contrast")
SEEDS = (0, 1)
RUNS = tuple((subject, of, seed) for seed in SEEDS for subject in SUBJECTS for of in SETS)
GUIDANCE = 4.0
USES = ("content", "style", "both")
SPLIT = {"both": f"a {RARE} {{subject}} in {{style}} style"}


@dataclass(frozen=True)
class Contender:
    """A row of the table: a method with settings, and which file serves which use."""

    method: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    content: str = "content"
    style: str = "style"
    joint: str = ""  # what the two files' names end in for use together


CONTENDERS = {
    "base alone": Contender(),
    "DreamBooth-LoRA": Contender("dreambooth", content="lora", style="lora"),
    "UnZipLoRA official": Contender("unziplora", (("compat", "official"), ("column_ratio", 0.1)), joint="_joint"),
    "UnZipLoRA corrected": Contender("unziplora"),
}


@dataclass(frozen=True)
class Item:
    """One drawing: its use, prompt, LoRAs, and the set and subject of the true counterpart."""

    use: str
    prompt: str
    loras: tuple[Use, ...]
    subject: str
    set: str


def items(contender: Contender, folder: Path, subject: str, of: str) -> list[Item]:
    """Content: the subject in four other styles. Style: four known subjects in the style. Both: the picture again."""
    word = STYLE_WORDS[of]
    content, style = folder / f"{contender.content}.safetensors", folder / f"{contender.style}.safetensors"
    have = contender.method is not None
    content_prompt, style_prompt = f"a {RARE} {subject}", f"a {subject} in {word} style"
    joint = [file.with_stem(file.stem + contender.joint) for file in (content, style)]
    both = (
        (Use(content),)
        if content == style
        else (Use(joint[0], prompt=content_prompt), Use(joint[1], prompt=style_prompt))
    )
    out = [
        Item("content", f"a {RARE} {subject} in {STYLE_WORDS[other]} style", (Use(content),) * have, subject, other)
        for other in TRAIN_SETS
    ]
    out += [Item("style", f"a {other} in {word} style", (Use(style),) * have, other, of) for other in OTHERS]
    out += [Item("both", f"a {RARE} {subject} in {word} style", both * have, subject, of)]
    return out


def study(work: Path, only: tuple[str, ...], shard: tuple[int, int]) -> None:
    """Train and draw everything that is not there yet."""
    mine = RUNS[shard[0] :: shard[1]]
    for name, (subject, of, seed) in ((name, one) for one in mine for name in CONTENDERS if name in only):
        folder = _folder(work, name, subject, of, seed)
        if (folder / "drawn" / "08.png").exists():
            continue
        contender = CONTENDERS[name]
        if contender.method and not (folder / f"{contender.style}.safetensors").exists():
            _train(contender, folder, subject, of, seed)
        _draw(load(), items(contender, folder, subject, of), folder, seed)
        print(f"{name}: {subject}, {of}, seed {seed}", flush=True)


def _train(contender: Contender, folder: Path, subject: str, of: str, seed: int) -> None:
    source = pictures.save_image(held_out_art().image(subject, of), folder.parent / f"{subject}-{of}.png")
    words = {"subject": subject, "style": STYLE_WORDS[of]}
    if contender.method == "dreambooth":
        words = {"prompt": SPLIT["both"].format(**words)}
    todo = job(
        [source], words, method=str(contender.method), out=folder, seed=seed, previews=0, **dict(contender.settings)
    )
    for _ in run(todo, resume=(folder / "run.toml").exists()):
        pass


def _draw(base: Base, todo: list[Item], folder: Path, seed: int) -> None:
    for i, item in enumerate(todo):
        (image,) = render(base, item.prompt, item.loras, seeds=(seed,), guidance=GUIDANCE)
        pictures.save_image(image, folder / "drawn" / f"{i:02d}.png")


def scores(folder: Path, todo: list[Item], judge: Judge) -> list[tuple[str, float, float]]:
    """(use, content, style): cosines of what was drawn to the true counterparts; nothing for an unfinished run."""
    files = sorted((folder / "drawn").glob("*.png"))
    if len(files) < len(todo):
        return []
    drawn = torch.stack([torch.from_numpy(np.array(Image.open(file), np.float32) / 255) for file in files]).permute(
        0, 3, 1, 2
    )
    truth = torch.stack([_truth(item).picture(item.subject, item.set) for item in todo])
    return _compare(todo, drawn, truth, judge)


def _truth(item: Item) -> Art:
    return known_art() if item.subject in known_art().names else held_out_art()


def report(work: Path) -> str:
    """Mean cosine to the true counterpart ± standard error over pictures; harmonic mean of the two means. The last row
    is the ceiling: the true counterparts themselves, as the base's autoencoder gives them back."""
    judge = load_judge()
    lines = [
        "| method | "
        + " | ".join(f"{use}: content | {use}: style" for use in USES)
        + " | content | style | harmonic mean |"
    ]
    lines.append("|---" * (4 + 2 * len(USES)) + "|")
    by_run: dict[str, dict[tuple[str, str, int], float]] = {}
    for name, contender in CONTENDERS.items():
        rows, by_run[name] = [], {}
        for one in RUNS:
            folder = _folder(work, name, *one)
            found = scores(folder, items(contender, folder, *one[:2]), judge)
            rows += found
            if found:
                by_run[name][one] = harmonic(*_means(found))
        if rows:
            lines.append(f"| {name} | {' | '.join(_cells(rows))} ({len(by_run[name])} runs) |")
    lines.append(f"| the true counterparts through the autoencoder | {' | '.join(_cells(_ceiling(judge)))} |")
    return "\n".join([*lines, "", *_leads(by_run)])


def _leads(by_run: dict[str, dict[tuple[str, str, int], float]]) -> Iterator[str]:
    """Run by run, how far the last contender's harmonic mean is ahead of each other one's; over all seeds, and by seed."""
    *others, best = by_run
    for name in others:
        leads = {
            one: by_run[best][one] - by_run[name][one] for one in RUNS if one in by_run[best] and one in by_run[name]
        }
        groups = {"": list(leads.values())}
        groups |= {f", seed {seed}": [lead for one, lead in leads.items() if one[2] == seed] for seed in SEEDS}
        for title, some in groups.items():
            if len(some) > 1:
                ahead = sum(lead > 0 for lead in some)
                yield f"{best} − {name}, run by run{title}: {with_error(some)}, ahead in {ahead} of {len(some)}"


def _ceiling(judge: Judge) -> list[tuple[str, float, float]]:
    vae, todo = load().vae, [item for one in RUNS for item in items(CONTENDERS["base alone"], Path(), one[0], one[1])]
    truth = torch.stack([_truth(item).picture(item.subject, item.set) for item in todo])
    with torch.no_grad():
        coded = vae.decode(vae.encode(truth * 2 - 1).latent_dist.mode()).sample / 2 + 0.5  # type: ignore[union-attr]
    return _compare(todo, coded, truth, judge)


def _compare(todo: list[Item], drawn: Tensor, truth: Tensor, judge: Judge) -> list[tuple[str, float, float]]:
    (content, style), (true_content, true_style) = judge.embed(drawn), judge.embed(truth)
    pairs = zip(todo, similarity(content, true_content).tolist(), similarity(style, true_style).tolist(), strict=True)
    return [(item.use, c, s) for item, c, s in pairs]


def _folder(work: Path, name: str, subject: str, of: str, seed: int) -> Path:
    return work / name.replace(" ", "-") / f"{subject}-{of}-{seed}"


def _cells(rows: list[tuple[str, float, float]]) -> list[str]:
    cells = []
    for use in USES:
        for column in (1, 2):
            values = [float(row[column]) for row in rows if row[0] == use]
            cells.append(with_error(values))
    content, style = _means(rows)
    return [*cells, f"{content:.3f}", f"{style:.3f}", f"**{harmonic(content, style):.3f}**"]


def _means(rows: list[tuple[str, float, float]]) -> tuple[float, float]:
    """Content and style: means over the three uses of their means."""
    by_use = [[row[1:] for row in rows if row[0] == use] for use in USES]
    content, style = (statistics.mean(statistics.mean(row[i] for row in use) for use in by_use) for i in (0, 1))
    return content, style


def write_sheets(work: Path, out: Path) -> None:
    """One contact sheet per picture."""
    for subject in SUBJECTS:
        for of in SETS:
            pictures.save_image(_sheet(work, subject, of), out / f"{subject}-{STYLE_WORDS[of].replace(' ', '-')}.webp")


def _sheet(work: Path, subject: str, of: str) -> Image.Image:
    """What was drawn for one picture: a row per method, under the true counterparts."""
    expected = items(CONTENDERS["base alone"], work, subject, of)
    captions = [item.prompt.removeprefix("a ") for item in expected]
    truth = [(captions[i], _truth(item).image(item.subject, item.set)) for i, item in enumerate(expected)]
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = [
        (f"{subject}, {STYLE_WORDS[of]}: what the artists drew", truth)
    ]
    for name in CONTENDERS:
        folder = _folder(work, name, subject, of, SEEDS[0]) / "drawn"
        if folder.exists():
            rows.append((name, [("", Image.open(path)) for path in sorted(folder.glob("*.png"))]))
    return pictures.contact_sheet(rows, cell=96)


def main(
    work: Annotated[Path, typer.Option(help="Folder for runs, drawings and scores; reuse it to resume.")],
    only: Annotated[list[str] | None, typer.Option(help="Methods; default all.")] = None,
    shard: Annotated[str, typer.Option(help="I/N: do every N-th picture and seed, from the I-th.")] = "0/1",
    just_report: Annotated[bool, typer.Option("--report", help="Print the table of what is there.")] = False,
    sheets: Annotated[Path | None, typer.Option(help="Write a contact sheet per picture here.")] = None,
) -> None:
    if not just_report:
        first, _, count = shard.partition("/")
        study(work, tuple(only or CONTENDERS), (int(first), int(count)))
    print(report(work))
    if sheets:
        write_sheets(work, sheets)


if __name__ == "__main__":
    typer.run(main)
