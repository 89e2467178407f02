"""Reading captions: NAME.txt or NAME.caption beside NAME.png, one caption per line. All captions are read here."""

import codecs
import os
from pathlib import Path

from unbraid.common.errors import UsageError

SUFFIXES = (".txt", ".caption")  # the first that exists is used
LARGEST = 1 << 20  # bytes
MARKS = (  # UTF-32's before UTF-16's, because it starts with the same bytes
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def caption_file(picture: Path) -> Path | None:
    """The caption file of a picture, None if there is none."""
    files = (picture.with_suffix(suffix) for suffix in SUFFIXES) if picture.name else ()
    return next((file for file in files if os.path.isfile(file)), None)  # noqa: PTH113 (names that are too long)


def captions_of(picture: Path) -> tuple[str, ...]:
    """The captions of a picture, one per non-empty line; empty without a caption file. The encoding is detected by the byte order mark
    (UTF-8, UTF-16, UTF-32); without one it is UTF-8, or else Latin-1. UsageError for a file that is empty or not text."""
    file = caption_file(picture)
    if file is None:
        return ()
    try:
        with file.open("rb") as opened:
            data = opened.read(LARGEST + 1)
        text = _decoded(data)
    except (OSError, UnicodeError) as error:
        raise UsageError("cannot be read as text", file, "Save it as UTF-8, or take it away.") from error
    if len(data) > LARGEST:
        raise UsageError("is too large for a caption", file, "Write what the picture shows, one caption a line.")
    if any(not char.isprintable() and not char.isspace() and ord(char) < 0xA0 for char in text):
        raise UsageError("has control characters in it", file, "Save it as plain text.")
    found = tuple(line for line in (" ".join(one.split()) for one in text.splitlines()) if line)
    if not found:
        raise UsageError("the caption is empty", file, "Write what the picture shows, or take the file away.")
    return found


def caption_of(picture: Path) -> str | None:
    """The caption of a picture, None if it has none. UsageError if it has several."""
    found = captions_of(picture)
    if len(found) > 1:
        what = f"{len(found)} captions, one a line, where one can be used"
        raise UsageError(what, caption_file(picture), "Leave one line.")
    return found[0] if found else None


def _decoded(data: bytes) -> str:
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return data.decode(encoding)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252" if not set(data) & {0x81, 0x8D, 0x8F, 0x90, 0x9D} else "latin-1")
