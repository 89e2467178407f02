"""Draws ComfyUI workflows as their window shows them, for the docs: `python -m tools.workflow_pictures docs/pictures`."""

import argparse
import json
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve
from PIL import Image

ROOT = Path(__file__).parent.parent
WORKFLOWS = (*ROOT.glob("examples/comfyui/*.json"), *ROOT.glob("comfyui-nodes/example_workflows/*.json"))
WIDTH, GAP, LINE = 3.0, 0.9, 0.24  # inches: a node, the space between columns, a line of text
LONGEST = 38  # characters of a line
INK, PAPER, EDGE, OWN = "#222222", "#f4f4f4", "#8a8a8a", "#e3ecff"
COLOURS = ("#d1495b", "#2e86ab", "#3a7d44", "#b5651d", "#6a4c93", "#00798c", "#8d6a9f", "#5c5c5c")

Nodes = Mapping[str, Mapping[str, Any]]


def draw(nodes: Nodes) -> Image.Image:
    """A workflow in ComfyUI's API format: nodes in columns, each to the right of all that it reads."""
    by_column: dict[int, list[str]] = {}
    for name, column in columns(nodes).items():
        by_column.setdefault(column, []).append(name)
    texts = {name: _lines(node) for name, node in nodes.items()}
    heights = {name: LINE * (len(lines) + 0.8) for name, lines in texts.items()}
    tall = {c: sum(heights[name] + GAP / 2 for name in some) for c, some in by_column.items()}
    width, height = len(by_column) * (WIDTH + GAP), max(tall.values())
    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    corners: dict[str, tuple[float, float]] = {}
    for column, some in by_column.items():
        y = height - (height - tall[column]) / 2 - GAP / 4
        for name in some:
            corners[name] = column * (WIDTH + GAP) + GAP / 2, y
            y -= heights[name] + GAP / 2
    for i, (name, place, source) in enumerate(_links(nodes, texts)):
        (x0, y0), (x1, y1) = corners[source], corners[name]
        start, end = (x0 + WIDTH, y0 - LINE * 0.7), (x1, y1 - LINE * (place + 0.7))
        middle = (start[0] + end[0]) / 2
        curve = Curve([start, (middle, start[1]), (middle, end[1]), end], [1, 4, 4, 4])
        axes.add_patch(
            PathPatch(curve, fill=False, edgecolor=COLOURS[int(source) % len(COLOURS)], lw=1.4, alpha=0.85, zorder=i)
        )
    for name, (x, y) in corners.items():
        own = nodes[name]["class_type"].startswith("Unbraid")
        box = FancyBboxPatch((x, y - heights[name]), WIDTH, heights[name], "round,pad=0,rounding_size=0.08")
        box.set(facecolor=OWN if own else PAPER, edgecolor=EDGE, zorder=1000)
        axes.add_patch(box)
        for place, text in enumerate(texts[name]):
            weight = "bold" if place == 0 else "normal"
            axes.text(
                x + 0.1,
                y - LINE * (place + 0.7),
                text,
                color=INK,
                fontsize=8.5,
                va="center",
                weight=weight,
                zorder=1001,
            )
    data = BytesIO()
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(data, format="png", dpi=100)
    return Image.open(data).convert("RGB")


def columns(nodes: Nodes) -> dict[str, int]:
    """Node → its column: one more than the largest of those that it reads; one that reads none is next to its first reader."""
    sources = {
        name: {value[0] for value in node["inputs"].values() if isinstance(value, list)} for name, node in nodes.items()
    }

    @cache
    def column(name: str) -> int:
        return 1 + max(map(column, sources[name])) if sources[name] else 0

    readers = {name: [column(other) for other, read in sources.items() if name in read] for name in nodes}
    return {name: column(name) if sources[name] else min(readers[name], default=1) - 1 for name in nodes}


def _lines(node: Mapping[str, Any]) -> list[str]:
    """The text of a node: its title, its class if the title is another one, and its inputs."""
    title, kind = node["_meta"]["title"], node["class_type"]
    head = [_short(title)] + ([kind] if kind != title else [])
    return head + [
        key if isinstance(value, list) else _short(f"{key}: {value}") for key, value in node["inputs"].items()
    ]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _links(nodes: Nodes, texts: Mapping[str, list[str]]) -> list[tuple[str, int, str]]:
    """(node, line of the input in its text, node that it reads) of every connection."""
    return [
        (name, len(texts[name]) - len(node["inputs"]) + i, value[0])
        for name, node in nodes.items()
        for i, value in enumerate(node["inputs"].values())
        if isinstance(value, list)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for file in WORKFLOWS:
        draw(json.loads(file.read_text("utf-8"))).save(out / f"workflow-{file.stem}.webp", quality=85)
        print(out / f"workflow-{file.stem}.webp")


if __name__ == "__main__":
    main()
