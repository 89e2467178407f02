"""Checks a wheel before it is published: its size, that its data is in it, and that nothing else is.

`python -m tools.wheel dist` is the last step of `make package`."""

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

LARGEST = 80_000_000  # bytes; PyPI's own limit is 100 MB
NEEDED = (
    "unbraid/py.typed",
    "unbraid/__init__.pyi",
    "unbraid/bases/clip_merges.txt.gz",
    "unbraid/bases/icons/model_index.json",
    "unbraid/bases/icons/ATTRIBUTION.md",
    "unbraid/bases/icons/example.png",
    "unbraid/bases/icons/words.json",
    "unbraid/bench/truth/judge.safetensors",
    "unbraid/bench/truth/held_out.webp",
    "unbraid/bench/reports/report.html.j2",
)


def faults(wheel: Path) -> Iterator[str]:
    """What is wrong with a wheel: nothing if it can be published."""
    if (size := wheel.stat().st_size) >= LARGEST:
        yield f"{size / 1e6:.1f} MB; {LARGEST / 1e6:.0f} MB are allowed"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    yield from (f"{name} is missing" for name in NEEDED if name not in names)
    if not any(name.startswith("unbraid/bases/icons/") and name.endswith(".safetensors") for name in names):
        yield "the weights of icons are missing"
    information = wheel.name.rpartition("-py3")[0] + ".dist-info"
    yield from (f"{name} does not belong there" for name in names if name.split("/")[0] not in ("unbraid", information))


def main(folder: Path) -> int:
    """Print the size of the one wheel in a folder, or what is wrong. Returns the exit status."""
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        print(f"{folder}: {len(wheels)} wheels, where one is expected", file=sys.stderr)
        return 1
    found = list(faults(wheels[0]))
    for fault in found:
        print(f"{wheels[0]}: {fault}", file=sys.stderr)
    if not found:
        print(f"{wheels[0]}: {wheels[0].stat().st_size / 1e6:.1f} MB")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
