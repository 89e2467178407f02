"""Pictures of what the verbs make, for the README: `python -m tools.readme_pictures docs/pictures`.

Trains on the embedded base, from pictures that it has never seen: minutes for each."""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

import unbraid
from unbraid.bench.truth.art import held_out_art, known_art, to_image
from unbraid.bench.truth.filters import HELD_OUT_FILTERS
from unbraid.bench.truth.subjects import STYLE_WORDS, TRAIN_SETS
from unbraid.images import sheets
from unbraid.runs import showcase
from unbraid.runs.break_make import matrix

Cells = list[tuple[str, Image.Image]]
STYLES = showcase.STYLES[: showcase.MOST]
SUBJECTS = ("teapot", "castle", "panda", "violin")
MODULES = {"lion": "fluent-emoji", "house": "twemoji"}, {"pencil": "owl", "thermal": "grapes"}


def pair(work: Path) -> Image.Image:
    """One picture before and after, and the style on other subjects: the same seeds without and with it."""
    before, after = _filtered("owl", "pencil")
    run = unbraid.pair(before, after, subject="owl", style="pencil", base="icons", previews=0, out=work / "pair")
    prompts = [f"a {subject} in cartoon style" for subject in SUBJECTS]

    def draw(*styles: unbraid.Use) -> Cells:
        return [(prompt, unbraid.generate(prompt, base="icons", styles=styles, seeds=(0,))[0]) for prompt in prompts]

    rows: list[tuple[str, Cells]] = [
        ("one picture before and after", [("before", before), ("after", after)]),
        ("what the base draws", draw()),
        ("the same with the style, by style guidance", draw(unbraid.Use(run / "style.safetensors"))),
    ]
    return sheets.contact_sheet(rows, cell=192)


def learn(work: Path) -> Image.Image:
    """A picture of a thing, and the thing in other styles."""
    image = held_out_art().image("penguin", "openmoji")
    run = unbraid.learn([image], prompt="a sks penguin", base="icons", previews=0, out=work / "learn")
    prompts = [f"a sks penguin in {style} style" for style in STYLES]
    drawn = [(text, unbraid.generate(text, run / "lora.safetensors", base="icons", seeds=(0,))[0]) for text in prompts]
    return sheets.contact_sheet([("the picture", [("", image)]), ("drawn with its LoRA", drawn)], cell=192)


def roles(work: Path) -> Image.Image:
    """One LoRA of one picture, used as content and as style: in all layers, and without those of the other role."""
    image = _filtered("lion", "thermal")[1]
    prompt = "a sks lion in thermal style"
    run = unbraid.learn([image], prompt=prompt, base="icons", previews=0, out=work / "roles")
    prompts = {
        "content": [f"a sks lion in {style} style" for style in STYLES[:4]],
        "style": [f"a {subject} in thermal style" for subject in SUBJECTS],
    }

    def drawn(used: str, role: str) -> Cells:
        file = run / "lora.safetensors"
        drawings = (
            unbraid.generate(text, file, base="icons", seeds=(0,), lora_roles=role)[0] for text in prompts[used]
        )
        return list(zip(prompts[used], drawings, strict=True))

    rows: list[tuple[str, Cells]] = [("the picture", [(prompt, image)])]
    for used, other in (("content", "style"), ("style", "content")):
        rows += [
            (f"its LoRA as {used}, in all layers", drawn(used, "all")),
            (f"the same without the layers of {other}", drawn(used, used)),
        ]
    return sheets.contact_sheet(rows, cell=192)


def modules(work: Path) -> Image.Image:
    """Two content and two style modules, and every content with every style."""
    contents, styles = MODULES
    shown: dict[str, Image.Image] = {name: held_out_art().image(name, of) for name, of in contents.items()}
    shown |= {style: _filtered(subject, style)[1] for style, subject in styles.items()}
    made, partners = dict[str, Path](), _partners(work / "partners")
    for name, image in shown.items():
        kind = "content" if name in contents else "style"
        prompt = f"a sks {name}" if kind == "content" else f"a {styles[name]} in {name} style"
        run = unbraid.break_module(
            [image], kind=kind, prompt=prompt, base="icons", previews=0, partners=partners, out=work / name
        )
        made[name] = run / "module.safetensors"
    *_, sheet = matrix([made[one] for one in contents], [made[one] for one in styles], work / "matrix")
    inputs = ("the four pictures: two contents, two styles", list(shown.items()))
    with Image.open(sheet) as table:
        below = table.convert("RGB")
    above = sheets.contact_sheet([inputs], cell=192)
    whole = Image.new("RGB", (max(above.width, below.width), above.height + below.height), sheets.PAPER)
    whole.paste(above)
    whole.paste(below, (0, above.height))
    return whole


def _partners(folder: Path) -> Path:
    """Pictures that both kinds of modules are trained beside, each with its prompt."""
    folder.mkdir()
    for subject, of in zip(SUBJECTS, TRAIN_SETS, strict=True):
        sheets.save_image(known_art().image(subject, of), folder / f"{subject}.png")
        (folder / f"{subject}.txt").write_text(f"a {subject} in {STYLE_WORDS[of]} style\n")
    return folder


def _filtered(subject: str, style: str) -> tuple[Image.Image, Image.Image]:
    """A picture of a subject, and the same picture in the style of a filter."""
    values = held_out_art().picture(subject, "noto")
    return to_image(values), to_image(HELD_OUT_FILTERS[style](values[None])[0].clamp(0, 1))


PICTURES: Mapping[str, Callable[[Path], Image.Image]] = {
    "pair": pair,
    "learn": learn,
    "roles": roles,
    "modules": modules,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=PICTURES, help="one of the pictures")
    given = parser.parse_args()
    for name in [given.only] if given.only else PICTURES:
        with tempfile.TemporaryDirectory() as folder:
            PICTURES[name](Path(folder)).save(given.out / f"{name}.webp", quality=88)
        print(given.out / f"{name}.webp")


if __name__ == "__main__":
    main()
