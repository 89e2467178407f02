"""What the studio may read and write: its own folder alone, and uploads that unbraid's own readers accept."""

import os
import re
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unbraid.common.atomic import atomic, sha256
from unbraid.common.errors import UsageError, printable
from unbraid.files.formats.header import catalogue, check_readable, read_header
from unbraid.images.crop import check_size
from unbraid.images.folders import SUFFIXES
from unbraid.images.opening import open_image

Kind = Literal["picture", "LoRA"]
MOST = {"picture": 64 << 20, "LoRA": 2 << 30}  # bytes of an upload
SPARE = 1 << 30  # bytes that stay free on the disk
LONGEST = 300  # characters of a text field
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_=.-]{0,99}")  # of a run's folder, also of a grid's
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)  # names of devices on Windows
SERVED = ("cache", "runs", "loras", "sheets")  # the folders whose files a browser may get
EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".safetensors", ".txt", *SUFFIXES))  # of files it may get


@dataclass(frozen=True)
class Home:
    """The studio's folder: `runs` has a folder per training, `inputs` uploaded pictures, `loras` uploaded and made LoRAs,
    `sheets` drawings, `presets` saved settings, and `cache` what gradio keeps."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def loras(self) -> Path:
        return self.folder / "loras"

    def contains(self, path: Path) -> bool:
        """Whether a path, with all links followed, is in the studio's folder, and no part of it is hidden."""
        try:
            inside = path.resolve().relative_to(self.folder).parts
        except (OSError, ValueError, RuntimeError):  # another folder, a NUL in the name, a circle of links
            return False
        return not any(part.startswith(".") for part in inside)

    def uploaded(self, path: Path) -> bool:
        """Whether a path is absolute and in the folder of uploads."""
        inside = path.is_absolute() and ".." not in path.parts and self.contains(path)
        return inside and path.resolve().is_relative_to(self.folder / "cache")

    def serves(self, text: str) -> bool:
        """Whether the file of this absolute path may be sent to the browser."""
        path = Path(text)
        if not path.is_absolute() or ".." in path.parts or not self.contains(path):
            return False
        first = path.resolve().relative_to(self.folder).parts[:1]
        return first != () and first[0] in SERVED and path.suffix.lower() in EXTENSIONS

    def run(self, name: str) -> Path:
        """The folder of a run. UsageError if there is no run of this name in the studio's folder."""
        folder = self.runs / name if NAME.fullmatch(name) else None
        if not folder or folder.is_symlink() or not self.contains(folder) or not folder.is_dir():
            raise UsageError(
                "there is no such run in the studio's folder", printable(name, 60), "Choose one of the list."
            )
        return folder

    def new_run(self, wish: str) -> Path:
        """Make a folder for a run; its name is like `wish`, with a number if that one is taken."""
        stem = slug(wish)
        for number in range(1, 10_000):
            folder = self.runs / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise UsageError(f"cannot be written ({error.strerror})", folder, "Make room.") from error
            return folder
        raise UsageError("too many runs of this name", stem, "Remove some, or choose another name.")

    def lora_files(self) -> Mapping[str, Path]:
        """Name → file, for all LoRAs in the studio's folder: the results of its runs, newest first, and its library."""
        found = [*self._files(self.runs, "*/*.safetensors"), *self._files(self.loras, "*.safetensors")]
        found.sort(key=lambda path: -path.stat().st_mtime)
        return {path.relative_to(self.folder).as_posix(): path for path in found if path.stem != "state"}

    def lora(self, name: str) -> Path:
        """The LoRA file of a name in `lora_files`. UsageError for any other name."""
        found = self.lora_files().get(name)
        if found is None:
            raise UsageError(
                "there is no such LoRA in the studio's folder", printable(name, 60), "Choose one of the list."
            )
        return found

    def _files(self, folder: Path, pattern: str) -> Iterator[Path]:
        for path in folder.glob(pattern):
            if not path.is_symlink() and path.is_file() and self.contains(path):
                yield path

    def new_file(self, room: Literal["loras", "sheets", "cache"], wish: str, suffix: str) -> Path:
        """A path for a new file, in a folder that exists. Its name is like `wish`, with a number if that one is taken."""
        folder, stem = self.folder / room, slug(wish)
        folder.mkdir(parents=True, exist_ok=True)
        names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 10_000))
        return next(path for name in names if not (path := folder / f"{name}{suffix}").exists())

    def keep(self, upload: str | Path, kind: Kind) -> Path:
        """Check an uploaded file with unbraid's own readers, and copy it into the studio's folder. Returns the copy.

        UsageError for files that the browser did not upload, that are too large, or that the readers refuse."""
        given = Path(upload)
        if given.is_symlink() or not self.uploaded(given):
            raise UsageError("this is not an uploaded file", printable(given.name, 60), "Upload it again.")
        check_upload(given, kind)
        if shutil.disk_usage(self.folder).free - given.stat().st_size < SPARE:
            raise UsageError("the disk is nearly full", self.folder, "Make room.")
        out = self.folder / ("inputs" if kind == "picture" else "loras")
        kept = out / f"{slug(given.stem)}-{sha256(given)[:8]}{given.suffix.lower()}"
        if not kept.exists():
            with atomic(kept) as part:
                shutil.copyfile(given, part)
        return kept


def open_home(folder: Path) -> Home:
    """Make the studio's folder. UsageError if it cannot be written."""
    try:
        for name in ("runs", "inputs", "loras", "sheets", "presets", "cache"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror})", folder, "Choose another --folder.") from error
    return Home(folder.resolve())


def check_upload(path: Path, kind: Kind) -> None:
    """UsageError for a file that is too large, or that is no picture or no LoRA that unbraid reads. Its name counts, too."""
    most, name = MOST[kind], printable(path.name, 60)
    if path.is_file() and path.stat().st_size > most:
        raise UsageError(f"the file is too large: {most >> 20} MiB at most", name, "Make it smaller.")
    try:
        if kind == "LoRA":
            header = read_header(path)
            if path.suffix.lower() != ".safetensors":
                raise UsageError("is not a .safetensors file", name, "Rename it, if it is one.")
            check_readable(header, catalogue(header))
        elif path.suffix.lower() not in SUFFIXES:
            raise UsageError("is not a picture", name, "Give a PNG, JPEG or WebP file.")
        else:
            check_size(open_image(path), path)
    except UsageError as error:
        raise UsageError(error.what, name, error.fix) from error  # without the folder of the upload


def slug(text: str) -> str:
    """A text as a file name: ASCII letters, digits and hyphens, at most 60 characters; `run` if none are left."""
    plain = unicodedata.normalize("NFKD", text[:500]).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9_]+", "-", plain).strip("-_")[:60].rstrip("-_") or "run"
    return f"{name}-1" if RESERVED.fullmatch(name) else name


def checked_text(text: object, label: str, most: int = LONGEST) -> str:
    """The text of a form's field, without spaces at its ends. UsageError if it is too long, or not printable in one line."""
    if not isinstance(text, str | None):
        raise UsageError("is not a text", label, "Type it again.")
    found = (text or "").strip()
    if len(found) > most:
        raise UsageError(f"is {len(found)} characters long; {most} at most", label, "Make it shorter.")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Co", "Cn") for letter in found):
        raise UsageError("holds characters that cannot be shown", label, "Type it again, in one line.")
    return found


def keep_to(home: Home) -> None:
    """Make gradio keep its files in the studio's folder, and send nothing about its use. To be called before its import."""
    os.environ["GRADIO_TEMP_DIR"] = str(home.folder / "cache")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.chdir(home.folder / "cache")  # gradio gives out files of the folder in which it runs
