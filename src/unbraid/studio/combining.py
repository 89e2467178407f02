"""Two LoRAs compared, and drawn together in several ways on one sheet, with the same seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
from PIL import Image

from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError
from unbraid.files.merge_methods import METHODS as MERGES
from unbraid.files.plot import plot_interference
from unbraid.files.report import Interference, interference
from unbraid.files.tools import Source, merge_files
from unbraid.images.sheets import contact_sheet, save_image
from unbraid.methods import METHODS
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import Sampling, Use
from unbraid.studio import forms, queue
from unbraid.studio.drawing import Drawing, pictures
from unbraid.studio.safety import Home

TITLES: Mapping[str, str] = {
    "concat": "sum",
    "k-lora": "K-LoRA",
    "k-lora-released": "K-LoRA as released",
    "est-lora": "EST-LoRA",
    "np-lora": "NP-LoRA",
    "roles": "layers by role",
    "ziplora": "ZipRank",
}


@dataclass(frozen=True)
class Two:
    """Two LoRAs and their strengths: of a content, and of a style."""

    content: Use
    style: Use

    @property
    def uses(self) -> tuple[Use, Use]:
        return self.content, self.style


def ways() -> dict[str, str]:
    """Name → title of every way to combine two LoRAs: merges, ways of drawing, and the methods of `zip`, once trained."""
    merges = {name: TITLES.get(name, name) for name in MERGES}
    drawing = {name: TITLES.get(name, name) for name in get_args(Combine) if name != "sum"}
    return {
        **merges,
        **drawing,
        **{
            entry.name: f"{TITLES.get(entry.name, entry.title)}, trained"
            for entry in forms.methods("zip")
            if entry.name not in merges
        },
    }


def compared(home: Home, two: Two) -> tuple[str, Path]:
    """How much two LoRAs interfere, in a few sentences, and the plot of it, block by block."""
    found = interference(two.content.file, two.style.file)
    plot = home.new_file("sheets", f"{two.content.file.stem}-{two.style.file.stem}-interference", ".png")
    with atomic(plot) as part:
        plot_interference(found, part, (two.content.file.stem, two.style.file.stem))
    return verdict(found), plot


def verdict(found: Sequence[Interference]) -> str:
    """The figures of a comparison in words."""
    columns = np.concatenate([one.columns for one in found])
    worst = max(found, key=lambda one: float(one.columns.mean()))
    most = max(found, key=lambda one: one.overlap)
    return (
        f"Columns of the two changes resemble each other by **{columns.mean():.2f}** on average (|cos|: 0 is no interference, "
        f"1 is full); most in block {worst.block}: {worst.columns.mean():.2f}. Their input subspaces overlap by "
        f"**{100 * sum(one.overlap for one in found) / len(found):.0f} %**; most in block {most.block}: {100 * most.overlap:.0f} %."
    )


def sheet(home: Home, two: Two, chosen: Sequence[str], drawing: Drawing) -> tuple[Path, list[str]]:
    """One row per way, one column per seed. Returns the sheet's file, and what could not be drawn, in sentences."""
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = []
    left: list[str] = []
    titles = ways()
    for name in chosen:
        if name not in titles:
            raise UsageError("is none of the ways", "Ways", "Choose of the list.")
    for name in chosen:
        try:
            made = _drawn(home, two, name, drawing)
        except UsageError as error:
            left.append(f"{titles[name]}: {error.what}. {error.fix}")
            continue
        labels = [f"seed {seed}" for seed in drawing.sampling.seeds]
        rows.append((f"{titles[name]}: {drawing.prompt}", list(zip(labels, made, strict=True))))
    if not rows:
        raise UsageError(left[0] if left else "nothing is chosen", "Side by side", "")
    wish = f"{two.content.file.stem}-{two.style.file.stem}-side-by-side"
    return save_image(contact_sheet(rows), home.new_file("sheets", wish, ".png")), left


def _drawn(home: Home, two: Two, way: str, drawing: Drawing) -> list[Image.Image]:
    if way == "concat":
        return pictures(replace(drawing, uses=two.uses))
    if way in get_args(Combine):
        combine: Any = way
        return pictures(replace(drawing, uses=two.uses, combine=combine))
    if way in MERGES:
        with TemporaryDirectory(dir=home.folder / "cache") as folder:
            return pictures(replace(drawing, uses=(Use(merged(two, way, Path(folder) / "merged.safetensors")),)))
    return pictures(replace(drawing, uses=zipped(home, two, way)))


def merged(two: Two, way: str, out: Path) -> Path:
    """Merge the two into one file. UsageError for other ways than those of `merge`."""
    if way not in MERGES:
        raise UsageError(f"{way} makes no single file", "Ways", f"There are: {', '.join(MERGES)}.")
    return merge_files([Source(use.file, use.scale) for use in two.uses], out, way).path


def zipped(home: Home, two: Two, method: str) -> tuple[Use, ...]:
    """The results of a finished training that zipped these two files, at their strengths. UsageError if there is none."""
    wanted = {"content": str(two.content.file), "style": str(two.style.file)}
    for run in queue.runs(home):
        record = queue.record(run.folder)
        if run.state == "done" and record.get("method") == method and record.get("loras") == wanted:
            stems = METHODS[method].outputs(record[method])
            if stems.keys() == wanted.keys():
                scales = {"content": two.content.scale, "style": two.style.scale}
                return tuple(Use(run.folder / f"{stem}.safetensors", scales[stem]) for stem in stems)
    raise UsageError("these two have not been zipped yet", method, "Press *Zip the two*, and wait for it in the queue.")


def default_drawing(prompt: str, base: str, seeds: int) -> Drawing:
    return Drawing(prompt, base, sampling=Sampling(seeds=range(seeds)))
