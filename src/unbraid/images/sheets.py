"""Labelled contact sheets, and the plot of the loss."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from unbraid.common.atomic import atomic

GAP = 6  # pixels between pictures
TITLE, CAPTION = 22, 20  # pixels: their heights
SPACE = 18  # pixels between rows, so that a title is seen to belong to its row
CELLS = 128, 512  # pixels: the smallest and largest side of a picture on a sheet
PAPER, INK = "white", "#333333"


def contact_sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], cell: int = 0) -> Image.Image:
    """Rows of captioned pictures, `cell` pixels each, every row below its title. Without `cell` they have the size that most pictures have,
    but 128 to 512 pixels. A picture that is enlarged by a whole factor is not smoothed, so that its pixels can be seen."""
    usual = mode(max(picture.size) for _, cells in rows for _, picture in cells)
    cell = cell or min(max(usual, CELLS[0]), CELLS[1])
    font = ImageFont.load_default(13)
    columns = max(len(cells) for _, cells in rows)
    row_height = TITLE + cell + CAPTION + SPACE
    sheet = Image.new("RGB", (GAP + columns * (cell + GAP), GAP + len(rows) * row_height - SPACE), PAPER)
    pen = ImageDraw.Draw(sheet)
    for r, (title, cells) in enumerate(rows):
        top = GAP + r * row_height
        pen.text((GAP, top), _plain(title), INK, font)
        for c, (label, picture) in enumerate(cells):
            left = GAP + c * (cell + GAP)
            sheet.paste(_scaled(picture, cell), (left, top + TITLE))
            pen.text((left, top + TITLE + cell + 2), _short(label, pen, font, cell), INK, font)
    return sheet


def _scaled(picture: Image.Image, cell: int) -> Image.Image:
    ratio = cell / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    whole = ratio == int(ratio)
    scaled = picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(scaled, ((cell - scaled.width) // 2, (cell - scaled.height) // 2))
    return square


def _short(label: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    label = _plain(label)
    if pen.textlength(label, font) <= width:
        return label
    while label and pen.textlength(label + "…", font) > width:
        label = label[:-1]
    return label.rstrip() + "…"


def _plain(text: str) -> str:
    """A text as one line that a font can measure. File names can contain characters that none can."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def save_image(picture: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> Path:
    """Save a picture in the format of its suffix. `texts`: key → text to store in it, if it is a PNG."""
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_itxt(key, text)
    more: dict[str, Any] = {"pnginfo": info} if path.suffix.lower() == ".png" else {}
    with atomic(path) as part:
        picture.save(part, **more)
    return path


def running_mean(losses: Sequence[float]) -> tuple[list[float], int]:
    """The mean of each value and those before it, over a twentieth of all; and how many these are."""
    span = max(1, len(losses) // 20)
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(sums[i + 1] - sums[max(0, i + 1 - span)]) / min(i + 1, span) for i in range(len(losses))], span


def loss_plot(losses: Sequence[float], path: Path) -> Path:
    """Plot the loss over steps: every value, and a running mean over a twentieth of the run."""
    from matplotlib.figure import Figure

    smooth, span = running_mean(losses)
    figure = Figure((7, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="#c8d3e6", linewidth=0.8, label="step")
    axes.plot(smooth, color="#1f4e9c", linewidth=1.6, label=f"mean of {span}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    with atomic(path) as part:
        figure.savefig(part)
    return path


def loss_plots(losses: Mapping[str, Sequence[float]], path: Path) -> Path | None:
    """Plot the losses of several runs, by name, each as a running mean. None if there are none."""
    from matplotlib.figure import Figure

    if not losses:
        return None
    figure = Figure((9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, some in losses.items():
        axes.plot(running_mean(some)[0], linewidth=1, label=name[-40:])
    axes.set(xlabel="step", ylabel="loss, running mean", yscale="log")
    if len(losses) <= 12:
        axes.legend(frameon=False, fontsize=7)
    with atomic(path) as part:
        figure.savefig(part)
    return path
