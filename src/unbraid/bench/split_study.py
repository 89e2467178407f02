"""Is a split right? Held-out pictures are split, the LoRAs used in three ways, and the judge compares the
results with what the artists really drew.

    python -m unbraid.bench.split_study --work DIR            # hours on a CPU; resumable
    python -m unbraid.bench.split_study --work DIR --report   # table and sheets from what is there
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from unbraid import pictures
from unbraid.api import job
from unbraid.base import Base, load
from unbraid.bases.recipe.subjects import STYLE_WORDS, TRAIN_SETS
from unbraid.bench.art import Art, held_out_art, known_art
from unbraid.bench.judge import load_judge, similarity
from unbraid.render import Use, render
from unbraid.run import RARE, run

SUBJECTS = ("fox", "guitar", "mushroom", "rocket")
SETS = ("openmoji", "fluent-emoji-high-contrast")
SEEDS = (0, 1)
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
    "UnZipLoRA official": Contender("unziplora", (("compat", "official"),), joint="_joint"),
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
    out += [Item("style", f"a {other} in {word} style", (Use(style),) * have, other, of) for other in known_art().names]
    out += [Item("both", f"a {RARE} {subject} in {word} style", both * have, subject, of)]
    return out


def study(work: Path, only: tuple[str, ...], shard: tuple[int, int]) -> None:
    """Train and draw everything that is not there yet."""
    todo = [
        (name, subject, of, seed)
        for subject in SUBJECTS
        for of in SETS
        for seed in SEEDS
        for name in CONTENDERS
        if name in only
    ]
    for name, subject, of, seed in todo[shard[0] :: shard[1]]:
        folder = work / name.replace(" ", "-") / f"{subject}-{of}-{seed}"
        if (folder / "scores.json").exists():
            continue
        contender = CONTENDERS[name]
        if contender.method and not (folder / f"{contender.style}.safetensors").exists():
            _train(contender, folder, subject, of, seed)
        _draw(load(), contender, folder, subject, of, seed)
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


def _draw(base: Base, contender: Contender, folder: Path, subject: str, of: str, seed: int) -> None:
    judge, rows = load_judge(), []
    for i, item in enumerate(items(contender, folder, subject, of)):
        (image,) = render(base, item.prompt, item.loras, seeds=(seed,))
        truth = _truth(item).picture(item.subject, item.set)
        pictures.save_image(image, folder / "drawn" / f"{i:02d}.png")
        drawn = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
        (content, style), (true_content, true_style) = judge.embed(drawn[None]), judge.embed(truth[None])
        rows.append(
            {
                "use": item.use,
                "content": similarity(content, true_content).item(),
                "style": similarity(style, true_style).item(),
            }
        )
    with pictures.atomic(folder / "scores.json") as part:
        part.write_text(json.dumps(rows))


def _truth(item: Item) -> Art:
    return known_art() if item.subject in known_art().names else held_out_art()


def report(work: Path, sheets: Path | None) -> str:
    """Mean cosine to the true counterpart ± standard error over pictures, and harmonic means."""
    lines = [
        "| method | "
        + " | ".join(f"{use}: content | {use}: style" for use in USES)
        + " | content | style | harmonic mean |"
    ]
    lines.append("|---" * (4 + 2 * len(USES)) + "|")
    for name in CONTENDERS:
        found = sorted((work / name.replace(" ", "-")).glob("*/scores.json"))
        rows = [row for path in found for row in json.loads(path.read_text())]
        if not rows:
            continue
        cells, means = [], {"content": [], "style": []}
        for use in USES:
            for what in ("content", "style"):
                values = [row[what] for row in rows if row["use"] == use]
                means[what].append(statistics.mean(values))
                cells.append(f"{means[what][-1]:.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}")
        content, style = statistics.mean(means["content"]), statistics.mean(means["style"])
        cells += [f"{content:.3f}", f"{style:.3f}", f"**{_harmonic(content, style):.3f}** ({len(found)} runs)"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if sheets:
        for subject in SUBJECTS:
            for of in SETS:
                pictures.save_image(
                    _sheet(work, subject, of), sheets / f"{subject}-{STYLE_WORDS[of].replace(' ', '-')}.webp"
                )
    return "\n".join(lines)


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a > 0 and b > 0 else 0.0


def _sheet(work: Path, subject: str, of: str) -> Image.Image:
    """What was drawn for one picture: a row per method, under the true counterparts."""
    expected = items(CONTENDERS["base alone"], work, subject, of)
    captions = [item.prompt.removeprefix("a ") for item in expected]
    truth = [(captions[i], _truth(item).image(item.subject, item.set)) for i, item in enumerate(expected)]
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = [
        (f"{subject}, {STYLE_WORDS[of]}: what the artists drew", truth)
    ]
    for name in CONTENDERS:
        folder = work / name.replace(" ", "-") / f"{subject}-{of}-{SEEDS[0]}" / "drawn"
        if folder.exists():
            rows.append((name, [("", Image.open(path)) for path in sorted(folder.glob("*.png"))]))
    return pictures.contact_sheet(rows, cell=96)


def main(
    work: Annotated[Path, typer.Option(help="Folder for runs, drawings and scores; reuse it to resume.")],
    only: Annotated[list[str] | None, typer.Option(help="Methods; default all.")] = None,
    shard: Annotated[str, typer.Option(help="I/N: do every N-th run, from the I-th.")] = "0/1",
    just_report: Annotated[bool, typer.Option("--report", help="Print the table of what is there.")] = False,
    sheets: Annotated[Path | None, typer.Option(help="Write a contact sheet per picture here.")] = None,
) -> None:
    if not just_report:
        first, _, count = shard.partition("/")
        study(work, tuple(only or CONTENDERS), (int(first), int(count)))
    print(report(work, sheets))


if __name__ == "__main__":
    typer.run(main)
