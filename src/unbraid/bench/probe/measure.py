"""How far content and style of a picture follow a prompt that one group of blocks alone reads."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unbraid.bases.base import Base
from unbraid.bench.field.models import FieldModels
from unbraid.bench.field.scores import embed
from unbraid.bench.probe.swap import drawn, groups
from unbraid.bench.probe.words import draws_icons
from unbraid.bench.truth.scores import judge, values_of
from unbraid.common.errors import UsageError
from unbraid.core.selectors import ROLES
from unbraid.sampling.sample import NEGATIVE

Pictures = Sequence[Image.Image]
Swapped = Sequence[str] | None  # groups in which something else is used: (): in none; None: in the whole model
Embed = Callable[[Pictures], Tensor]  # pictures → `[n, d]`, unit norm
EVERYWHERE = "all groups"
FIXES = {"prompts": "subjects and styles", "LoRAs": "LoRAs"}
RESAMPLES, FEWEST = 2000, 4  # of the bootstrap; pairs without which no role is given


@dataclass(frozen=True)
class Eyes:
    """What looks at the pictures: an embedding of content and one of style, and their names."""

    content: Embed
    style: Embed
    names: dict[str, str]


@dataclass(frozen=True)
class Change:
    """Pictures that are drawn in one way, in another, and in the other way in some groups of blocks alone. `roles`: what is
    looked at."""

    roles: Sequence[str]
    draw: Callable[[Swapped], Pictures]


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is drawn, and how: `seeds` pictures of each of `pairs`; up to `size` neighbouring blocks are one group."""

    pairs: int = 8
    seeds: int = 2
    steps: int = 20
    guidance: float = 4.0
    size: int = 1

    @property
    def swapped(self) -> str:
        """What a group has alone, for the picture."""
        return "a prompt that this group alone reads"

    @property
    def source(self) -> str:
        """What was swapped, for the file of roles, if not prompts."""
        return ""


@dataclass(frozen=True)
class Plan(Amount):
    """What is drawn. Pair i swaps subject i for the next one, and style i for the next one."""

    subjects: Sequence[str]
    styles: Sequence[str]

    def pair(self, i: int) -> dict[str, tuple[str, str]]:
        """Role → the prompt, and the prompt in which this role is another one."""
        subjects, styles = ([some[(i + j) % len(some)] for j in (0, 1)] for some in (self.subjects, self.styles))
        text = "a {} in {} style".format
        plain = text(subjects[0], styles[0])
        return {"content": (plain, text(subjects[1], styles[0])), "style": (plain, text(subjects[0], styles[1]))}


@dataclass(frozen=True)
class Effect:
    """How far one role of the pictures follows the swapped prompt: 0 not at all, 1 as if all had it. `low`, `high`: the 90 %
    confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """A group of blocks, its effect on each role, and the role that it gets, or none. `lead`: content's effect minus style's."""

    modules: tuple[str, ...]
    content: Effect
    style: Effect
    lead: Effect
    role: str


def eyes(base: Base, models: FieldModels) -> Eyes:
    """The models that are given: DINO or CLIP for content, CSD or CLIP for style. Without, the judge on a base that draws icons; on
    another base UsageError."""
    clip = models.clip.image if models.clip else None
    content, style = models.dino or clip, models.csd or clip
    if content and style:
        named = {"content": f"{content.label} {content.name}", "style": f"{style.label} {style.name}"}
        return Eyes(lambda some: embed(content, some), lambda some: embed(style, some), named)
    if content or style or not draws_icons(base.name):
        fix = "Give --dino and --csd, or --clip for both."
        raise UsageError("the judge sees only pictures of the embedded base", base.name, fix)

    def seen(pictures: Pictures) -> tuple[Tensor, Tensor]:
        return judge().embed(torch.stack([values_of(one) for one in pictures]))

    return Eyes(lambda some: seen(some)[0], lambda some: seen(some)[1], dict.fromkeys(ROLES, "the judge"))


def probe(base: Base, looking: Eyes, plan: Plan) -> Iterator[tuple[int, int] | list[Row]]:
    """Draw and measure. Yields (drawings done, of how many), at the end the rows: first that of all groups together.

    Raises UsageError if a prompt never changes what the pictures show."""
    if min(len(plan.subjects), len(plan.styles)) < 2:
        raise UsageError("nothing to swap", "probe-blocks", "Give two subjects and two styles, or more.")
    yield from measured(looking, groups(base, plan.size), _changes(base, plan), plan.pairs * len(ROLES), "prompts")


def _changes(base: Base, plan: Plan) -> Iterator[Change]:
    how = {"guidance": plan.guidance, "steps": plan.steps}
    for i in range(plan.pairs):
        seeds = range(i * plan.seeds, (i + 1) * plan.seeds)
        for role, (plain, other) in plan.pair(i).items():
            texts = {"main": base.encode_prompt(plain), "other": base.encode_prompt(other)}
            some = base.alike({**texts, NEGATIVE: base.encode_negative()})
            whole = {**some, "main": some["other"]}

            def draw(swapped: Swapped, some: Any = some, whole: Any = whole, seeds: Any = seeds) -> Pictures:
                return drawn(base, whole if swapped is None else some, swapped or (), **how, seeds=seeds)

            yield Change((role,), draw)


def measured(
    looking: Eyes, found: Sequence[tuple[str, ...]], changes: Iterable[Change], count: int, what: str
) -> Iterator[tuple[int, int] | list[Row]]:
    """Draw each of `count` changes in every group of `found`, and measure. Yields as `probe` does. `what`: what is swapped,
    for the UsageError if it never changes what the pictures show."""
    chosen = [tuple(name for some in found for name in some), *found]
    moved: dict[str, list[list[float]]] = {role: [[] for _ in chosen] for role in ROLES}
    span: dict[str, list[float]] = {role: [] for role in ROLES}
    done, total = 0, count * (len(chosen) + 2)
    for change in changes:
        both = [change.draw(swapped) for swapped in ((), None)]
        ends = {role: [getattr(looking, role)(pictures) for pictures in both] for role in change.roles}
        done += 2
        for role, (begin, end) in ends.items():
            span[role].append(float((2 - 2 * (begin * end).sum(1)).sum()))
        for j, swapped in enumerate(chosen):
            pictures = change.draw(swapped)
            for role, (begin, end) in ends.items():
                here = getattr(looking, role)(pictures)
                way = (here * end).sum(1) - (here * begin).sum(1) + 1 - (begin * end).sum(1)
                moved[role][j].append(float(way.sum()))
            done += 1
            yield done, total
    for role in ROLES:
        if sum(span[role]) < 1e-6:
            raise UsageError(f"the {what} do not change the {role}", "probe-blocks", f"Give other {FIXES[what]}.")
    yield [_row(modules, *([moved[role][j], span[role]] for role in ROLES)) for j, modules in enumerate(chosen)]


def _row(modules: tuple[str, ...], content: list[list[float]], style: list[list[float]]) -> Row:
    """The effects of a group. Each is a sum of ways moved over a sum of whole ways; pairs are resampled for the intervals.
    `content`, `style`: the way moved and the whole way of each pair."""
    rng = np.random.default_rng(0)
    draws = rng.integers(len(content[0]), size=(RESAMPLES, len(content[0])))
    ways = [np.array([one, whole]) for one, whole in (content, style)]
    sampled = [way[:, draws].sum(2) for way in ways]
    ratios = [one[0] / np.maximum(one[1], 1e-9) for one in sampled]
    means = [float(way[0].sum() / way[1].sum()) for way in ways]
    lead = _effect(means[0] - means[1], ratios[0] - ratios[1])
    sure = len(content[0]) >= FEWEST
    role = "content" if sure and lead.low > 0 else "style" if sure and lead.high < 0 else ""
    return Row(modules, _effect(means[0], ratios[0]), _effect(means[1], ratios[1]), lead, role)


def _effect(mean: float, resampled: np.ndarray) -> Effect:
    low, high = np.quantile(resampled, (0.05, 0.95))
    return Effect(mean, float(low), float(high))
