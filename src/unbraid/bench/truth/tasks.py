"""The four tasks of the benchmark: their inputs, what is drawn, and the true picture that each drawing is compared with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from unbraid.bench.truth.art import KNOWN
from unbraid.bench.truth.truths import BEFORE, TRAINED, Truth
from unbraid.runs.job import RARE
from unbraid.runs.settings import Settings

Task = Literal["separate", "combine", "transfer", "recombine"]
TASKS: dict[Task, str] = {
    "separate": "one picture → its subject in other styles, other subjects in its style, and the picture again",
    "combine": "pictures of a subject and a picture of a style → the subject in the style",
    "transfer": "one picture before and after → other subjects in the style",
    "recombine": "the subject of one picture in the style of another",
}
PLACE = "cat"  # the subject of the picture that a style is learnt from, in `combine`
TAUGHT, OTHERS = KNOWN[:4], KNOWN[4:]  # subjects of `transfer`: of the pairs; of the drawings
SHOWN = KNOWN[:4]  # the subjects that a style LoRA draws, in `separate`


@dataclass(frozen=True)
class Scale:
    """The size of a benchmark: each subject in one of the styles, the next subject in the next style. Cells are ordered by seed, so that
    an unfinished run is a complete benchmark of fewer seeds. One seed by default: with the same time, more subjects tell more."""

    subjects: tuple[str, ...]
    styles: tuple[str, ...] = ("line art", "stencil", "pencil")
    transferred: tuple[str, ...] = ("stencil", "pencil", "thermal")
    seeds: tuple[int, ...] = (0,)
    others: int = len(OTHERS)  # subjects drawn in each transferred style
    draws: int = 2  # pictures per prompt where diversity is measured
    steps: int = 25  # sampling steps
    guidance: float = 4.0
    training: Mapping[str, Settings] = field(default_factory=dict, hash=False)  # method → settings that replace its own


QUICK = Scale(("fox",), ("line art",), ("stencil",), others=5)
EIGHT = ("fox", "guitar", "mushroom", "fish", "cactus", "locomotive", "pizza", "parrot")
MORE = tuple(
    "airplane amphora banana bear butterfly camel carrot chair cherries crocodile flamingo frog giraffe grapes hammer headphone "
    "hedgehog kangaroo key leopard microscope motorcycle peacock penguin".split()
)
STYLES = ("line art", "stencil", "pencil", "thermal")
FULL = Scale((*EIGHT, *MORE), STYLES)
MEDIUM = Scale(EIGHT, STYLES)


@dataclass(frozen=True)
class Cell:
    """One problem: the pictures that subject and style come from, and the seed of training and drawing."""

    task: Task
    content: Truth  # `combine`: one of the subject's pictures; `transfer`: the picture before
    style: Truth  # `transfer`: the picture after
    seed: int

    @property
    def subject(self) -> str:
        return self.content.subject

    def __str__(self) -> str:
        return f"{self.content} + {self.style}, seed {self.seed}"


@dataclass(frozen=True)
class Item:
    """One prompt to draw at some seeds, and the true picture to compare with. `leaks`: the true picture whose content, or whose style,
    must not show in it."""

    use: Literal["content", "style", "both"]
    prompt: str
    truth: Truth
    leaks: Mapping[Literal["content", "style"], Truth]
    seeds: tuple[int, ...]


def cells(scale: Scale) -> Iterator[Cell]:
    """Every problem of a size, seed by seed. In `recombine` the style comes from a picture of the next subject, if there are several."""
    for seed in scale.seeds:
        for i, subject in enumerate(scale.subjects):
            other = scale.subjects[(i + 1) % len(scale.subjects)]
            style, apart = (scale.styles[(i + j) % len(scale.styles)] for j in (0, 1))
            picture = Truth(subject, style)
            yield Cell("separate", picture, picture, seed)
            yield Cell("combine", Truth(subject, TRAINED[0]), Truth(PLACE, style), seed)
            elsewhere = Truth(PLACE if other == subject else other, scale.transferred[0] if apart == style else apart)
            yield Cell("recombine", picture, elsewhere, seed)
            for style in scale.transferred if i == 0 else ():
                yield Cell("transfer", Truth(TAUGHT[0], BEFORE[style]), Truth(TAUGHT[0], style), seed)


def content_prompt(subject: str) -> str:
    return f"a {RARE} {subject}"


def style_prompt(picture: Truth) -> str:
    return f"a {picture.subject} in {picture.style} style"


def joint_prompt(subject: str, style: str) -> str:
    return f"a {RARE} {subject} in {style} style"


def items(cell: Cell, scale: Scale) -> list[Item]:
    """Everything that is to be drawn in a cell."""
    first, subject, style = cell.seed * scale.draws, cell.subject, cell.style.style
    one, some = (first,), tuple(range(first, first + scale.draws))
    if cell.task == "transfer":
        plain = BEFORE[style]
        return [
            Item(
                "style",
                f"a {other} in {plain} style",
                Truth(other, style),
                {"content": cell.style},
                some if not i else one,
            )
            for i, other in enumerate(OTHERS[: scale.others])
        ]
    joint, truth = joint_prompt(subject, style), Truth(subject, style)
    if cell.task == "combine":
        return [Item("both", joint, truth, {"content": cell.style}, some)]
    if cell.task == "recombine":
        return [Item("both", joint, truth, {"content": cell.style, "style": cell.content}, some)]
    return [
        *(
            Item("content", joint_prompt(subject, word), Truth(subject, word), {"style": cell.style}, one)
            for word in TRAINED
        ),
        *(
            Item("style", f"a {other} in {style} style", Truth(other, style), {"content": cell.content}, one)
            for other in SHOWN
        ),
        Item("both", joint, truth, {}, some),
    ]
