"""How far content and style of a picture follow another LoRA in one group of blocks alone.

The prompt stays the same. Everywhere else the model has the first LoRA, also in layers that are in no group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from unbraid.bases.base import Base
from unbraid.bases.families.family import Prompt
from unbraid.bench.probe.measure import Amount, Change, Eyes, Pictures, Row, Swapped, measured
from unbraid.bench.probe.swap import groups
from unbraid.common.errors import UsageError
from unbraid.core.lora import Active, Lora
from unbraid.core.selectors import ROLES, selects
from unbraid.files.lora_file import LoraFile, read
from unbraid.sampling.attach import attach
from unbraid.sampling.sample import NEGATIVE, classifier_free, generate
from unbraid.sampling.uses import Loras, own_prompt

TWO = 2


@dataclass(frozen=True)
class LoraPlan(Amount):
    """What is drawn. Pair i begins with the LoRA i mod 2 and swaps the other one in, under that LoRA's own prompt, or under
    prompt i of `prompts`, if there are any."""

    files: Sequence[str]
    prompts: Sequence[str] = ()

    @property
    def swapped(self) -> str:
        return "a LoRA that this group alone has"

    @property
    def source(self) -> str:
        return f", swapping the LoRAs {' and '.join(Path(file).name for file in self.files)}"

    def pair(self, i: int) -> dict[str, str]:
        """The prompt, the LoRA at the beginning, and the one that is swapped in, by the names of their files."""
        first, second = (Path(self.files[(i + j) % TWO]) for j in range(TWO))
        return {"prompt": self.prompt(i), "begin": first.name, "other": second.name}

    def check(self) -> None:
        """Raise UsageError for a file that is no LoRA, or that records no prompt where none is given."""
        for i in range(TWO):
            _read(Path(self.files[i]))
            self.prompt(i)

    def prompt(self, i: int) -> str:
        if self.prompts:
            return self.prompts[i % len(self.prompts)]
        file = Path(self.files[i % TWO])
        try:
            return own_prompt(file, _read(file))
        except UsageError as error:
            raise UsageError(error.what, file, "Give --prompt TEXT.") from error


def probe_loras(base: Base, looking: Eyes, plan: LoraPlan) -> Iterator[tuple[int, int] | list[Row]]:
    """Draw and measure. Yields as `unbraid.bench.probe.measure.probe` does. Raises UsageError unless there are two LoRAs that
    fit the base, have prompts, and draw differently."""
    if len(plan.files) != TWO:
        raise UsageError(f"{len(plan.files)} LoRAs", "--lora", "Give two, or none to swap prompts.")
    yield from measured(looking, groups(base, plan.size, of_text=False), _changes(base, plan), plan.pairs, "LoRAs")


def _changes(base: Base, plan: LoraPlan) -> Iterator[Change]:
    opened = [(file, _read(file).modules) for file in map(Path, plan.files)]
    for i in range(plan.pairs):
        some = {"main": base.encode_prompt(plan.prompt(i)), NEGATIVE: base.encode_negative()}
        pair = {"begin": opened[i % TWO], "other": opened[(i + 1) % TWO]}
        yield Change(ROLES, partial(_drawn, base, plan, base.alike(some), pair, i))


def _drawn(
    base: Base, plan: LoraPlan, prompts: Mapping[str, Prompt], pair: Loras, i: int, swapped: Swapped
) -> Pictures:
    """Pictures with the LoRA `begin` of a pair, but with `other` in the groups `swapped`; None: with `other` alone."""
    loras = dict[str, tuple[Path, Mapping[str, Lora]]]()
    for role, (path, modules) in pair.items():
        inside = {name: one for name, one in modules.items() if _within(swapped, name) == (role == "other")}
        if inside:
            loras[role] = (path, inside)
    adapters = attach(base, loras)
    terms = classifier_free(plan.guidance, "main", tuple(map(Active, loras)))
    try:
        seeds = range(i * plan.seeds, (i + 1) * plan.seeds)
        return generate(base, terms, prompts, adapters, seeds=seeds, steps=plan.steps)
    finally:
        if adapters:
            adapters.detach()


@lru_cache(TWO)
def _read(file: Path) -> LoraFile:
    """A LoRA, which is needed for the prompts of all pairs, and for the pictures."""
    return read(file)


def _within(swapped: Swapped, name: str) -> bool:
    return swapped is None or selects(swapped, name)
