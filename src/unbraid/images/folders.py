"""Pictures in files and folders: which are used, which files are not, and which pictures form pairs. All folders are read here."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from PIL import features

from unbraid.common.errors import UsageError
from unbraid.images.captions import SUFFIXES as TEXTS
from unbraid.images.captions import caption_file

SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .jp2 .j2k .jpx .ppm .pgm .pnm .tga .psd .ico .qoi".split()
    + ([".avif"] if features.check("avif") else [])
)
RUN = "run.toml"  # marks the folder of a run
NAMED = 5  # most files that a warning lists by name


@dataclass(frozen=True)
class Found:
    """The pictures of a file or folder, sorted by name. `unused`: warnings about other files in the folder."""

    files: tuple[Path, ...]
    unused: tuple[str, ...] = ()


def look(path: Path) -> Found:
    """Find the pictures of a path, which is a file or a folder. UsageError for a folder without pictures, or one that a run has written."""
    if not os.path.isdir(path):  # noqa: PTH112 (pathlib's raises for names that are too long)
        return Found((path,))
    if (path / RUN).exists():
        fix = "Give the pictures that it learnt from, or a folder with nothing but pictures and their captions."
        raise UsageError("this is the folder of a run: its pictures are plots and samples", path, fix)
    try:
        inside = sorted(one for one in path.iterdir() if not one.name.startswith(".") and one.name != "Thumbs.db")
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror})", path, "Check the folder and its rights.") from error
    files = tuple(one for one in inside if one.suffix.lower() in SUFFIXES and one.is_file())
    if not files:
        raise UsageError("there are no images in this folder", path, f"Accepted: {', '.join(sorted(SUFFIXES))}.")
    read = {caption_file(one) for one in files}
    return Found(files, _unused(path, [one for one in inside if one not in files and one not in read]))


def _unused(folder: Path, left: Sequence[Path]) -> tuple[str, ...]:
    """A warning that lists the files that are not used, if there are any. Texts without a picture are marked."""
    if not left:
        return ()
    names = [
        f"{one.name}/" if one.is_dir() else f"{one.name} (no picture of that name)" if one.suffix in TEXTS else one.name
        for one in left
    ]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (f"{folder}: not used: {', '.join(names[:NAMED])}{more}",)


def list_images(path: Path) -> list[Path]:
    """The pictures of a file or folder; see `look`."""
    return list(look(path).files)


def unused(paths: Iterable[Path]) -> tuple[str, ...]:
    """The warnings about unused files, for several files and folders."""
    return tuple(warning for path in dict.fromkeys(paths) for warning in look(path).unused)


def matched(before: Path, after: Path) -> list[tuple[Path, Path]]:
    """Pairs of pictures: two files, or the pictures of two folders with the same names. A prefix or suffix that all names of a folder share
    is ignored (`1.png` and `1-ink.png`). UsageError for a picture without a counterpart."""
    if before.is_dir() != after.is_dir():
        raise UsageError(
            "one is a folder and the other is not", f"{before} and {after}", "Give two files or two folders."
        )
    first, second = list_images(before), list_images(after)
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    by_name = ({one.stem: one for one in first}, {one.stem: one for one in second})
    for one, (names, files) in zip((before, after), zip(by_name, (first, second), strict=True), strict=True):
        if len(names) < len(files):
            twice = next(file for file in files if names[file.stem] != file)
            raise UsageError(f"two pictures of the name {twice.stem!r}", one, "Take one of them away.")
    if by_name[0].keys() != by_name[1].keys():
        by_name = (_cores(by_name[0]), _cores(by_name[1]))
    alone = sorted(by_name[0].keys() ^ by_name[1].keys())
    if alone:
        owner = by_name[0].get(alone[0]) or by_name[1][alone[0]]
        fix = "Give both pictures of a pair one name, and take away what has no counterpart."
        raise UsageError(
            f"{len(first)} pictures before and {len(second)} after: no counterpart by its name", owner, fix
        )
    return [(by_name[0][name], by_name[1][name]) for name in sorted(by_name[0])]


def _cores(named: dict[str, Path]) -> dict[str, Path]:
    """The names without the prefix and suffix that all of them share → files."""
    start = _alike(list(named))
    end = _alike([name[start:][::-1] for name in named])
    return {name[start : len(name) - end]: file for name, file in named.items()}


def _alike(names: Sequence[str]) -> int:
    """The length of the prefix that all names share."""
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))
