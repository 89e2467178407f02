"""Stage 1: fetch the icon sets (npm, pinned) and rasterise the subjects that all six sets draw."""

import io
import json
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from unbraid.bench.truth.subjects import SETS
from unbraid.common.errors import UsageError

VERSIONS = {
    "noto": "1.2.9",
    "twemoji": "1.2.5",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
    "openmoji": "1.2.29",
}


def fetch(work: Path) -> None:
    """Download the six npm packages into `work/npm`. The only step that needs a network."""
    folder = work / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in VERSIONS.items():
        if _package(folder, name).exists():
            continue
        command = ["npm", "pack", "--silent", f"@iconify-json/{name}@{version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise UsageError("npm could not fetch an icon set", f"@iconify-json/{name}@{version}", done.stderr.strip())


def rasterise(work: Path, size: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """All common subjects in all sets as uint8 `[subject, set, size, size, 3]`, with their names."""
    out, names_file = work / f"art{size}.npy", work / "names.json"
    if out.exists() and names_file.exists():
        return np.load(out, mmap_mode="r"), tuple(json.loads(names_file.read_text()))
    sets = [_read(work / "npm", name) for name in SETS]
    names = sorted(set.intersection(*(set(one["icons"]) for one in sets)))
    jobs = [[(one["icons"][name], one.get("width", 16), one.get("height", 16)) for one in sets] for name in names]
    art = np.zeros((len(names), len(SETS), size, size, 3), np.uint8)
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(partial(_draw_row, size=size), jobs, chunksize=16)
        for row, pictures in enumerate(track(drawn, "rasterising", total=len(jobs))):
            art[row] = pictures
    part = out.with_suffix(".part.npy")
    np.save(part, art)
    names_file.write_text(json.dumps(names))
    part.rename(out)
    return art, tuple(names)


def icon_svg(icon: dict[str, Any], width: int, height: int) -> str:
    """The SVG document of one entry of an iconify `icons.json`, centred on a square."""
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", width), icon.get("height", height)
    side = max(width, height)
    box = [left - (side - width) / 2, top - (side - height) / 2, side, side]
    body = icon["body"].replace("currentColor", "#000")
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} viewBox="{" ".join(map(str, box))}">{body}</svg>'


def draw(svg: str, size: int) -> np.ndarray:
    """Rasterise on white: uint8 `[size, size, 3]`."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white")
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def _draw_row(row: list[tuple[dict[str, Any], int, int]], size: int) -> np.ndarray:
    return np.stack([draw(icon_svg(*entry), size) for entry in row])


def _package(folder: Path, name: str) -> Path:
    return folder / f"iconify-json-{name}-{VERSIONS[name]}.tgz"


def _read(folder: Path, name: str) -> dict[str, Any]:
    with tarfile.open(_package(folder, name)) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None
        return json.load(member)
