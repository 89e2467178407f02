"""A sheet of one picture at several strengths of a LoRA, of style guidance, or of guidance itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal

from PIL import Image

from unbraid.bases.base import Base
from unbraid.common.errors import UsageError
from unbraid.images.sheets import contact_sheet
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, Use, render

MOST = 25  # the largest number of values; more do not fit on a sheet


@dataclass(frozen=True)
class Sweep:
    """The quantity to vary, and its values."""

    what: Literal["lora", "style", "guidance"]
    values: tuple[float, ...]


def parse_sweep(text: str) -> Sweep:
    """`style=0:1.5:7`: seven values from 0 to 1.5, both included. Raises UsageError for anything else."""
    fix = "For example style=0:1.5:7, lora=-1:1:5 or guidance=1:8:8: from, to, how many."
    what, _, numbers = text.partition("=")
    try:
        first, last, count = (float(number) for number in numbers.split(":"))
    except ValueError as error:
        raise UsageError(f"{text!r} is no sweep", "--sweep", fix) from error
    fits = isfinite(first) and isfinite(last) and count == int(count) and 2 <= count <= MOST
    if not fits or (what != "lora" and what != "style" and what != "guidance"):
        raise UsageError(f"{text!r} is no sweep", "--sweep", fix)
    n = int(count)
    return Sweep(what, tuple(first + (last - first) * i / (n - 1) for i in range(n)))


def sweep_sheet(
    base: Base,
    prompt: str,
    over: Sweep,
    uses: Sequence[Use] = (),
    *,
    combine: Combine = "sum",
    styles: StyleGuidance = StyleGuidance(),
    sampling: Sampling = Sampling(),
    inputs: ImageInputs = ImageInputs(),
) -> Image.Image:
    """A sheet of the pictures of `swept`: a row per seed, a column per value."""
    given: dict[str, Any] = {"combine": combine, "styles": styles, "sampling": sampling, "inputs": inputs}
    return sheet_of(prompt, over, sampling.seeds, [images for _, images in swept(base, prompt, over, uses, **given)])


def swept(
    base: Base, prompt: str, over: Sweep, uses: Sequence[Use] = (), **settings: Any
) -> Iterator[tuple[float, list[Image.Image]]]:
    """Each value, with a picture per seed. The value multiplies the strength given with each LoRA or style.

    `settings`: the keyword arguments of `render`."""
    styles, sampling = settings.get("styles", StyleGuidance()), settings.get("sampling", Sampling())
    if over.what != "guidance" and not (uses if over.what == "lora" else styles.uses):
        option = "--lora" if over.what == "lora" else "--style-guidance"
        raise UsageError("there is nothing to vary", f"--sweep {over.what}", f"Give {option} FILE.")
    for value in over.values:
        loras = _scaled(uses, value) if over.what == "lora" else uses
        guides = replace(styles, uses=_scaled(styles.uses, value)) if over.what == "style" else styles
        how = replace(sampling, guidance=value) if over.what == "guidance" else sampling
        yield value, render(base, prompt, loras, **{**settings, "styles": guides, "sampling": how})


def sheet_of(prompt: str, over: Sweep, seeds: Sequence[int], columns: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """The sheet of a sweep. `columns`: for each value of `over`, a picture per seed."""
    rows = [
        (
            f"{prompt}, seed {seed}",
            [(f"{over.what} {value:g}", column[i]) for value, column in zip(over.values, columns, strict=True)],
        )
        for i, seed in enumerate(seeds)
    ]
    return contact_sheet(rows)


def _scaled(uses: Sequence[Use], value: float) -> list[Use]:
    return [replace(use, scale=use.scale * value) for use in uses]
