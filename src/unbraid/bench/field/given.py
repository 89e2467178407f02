"""A user's own pictures for the benchmark: subjects and styles, named by their files and folders.

    IMAGES/contents/red dog/*.png     pictures of a subject; for a single picture, contents/red dog.png
    IMAGES/styles/cat in ink.png      a picture of a style, named SUBJECT in STYLE; or styles/ink/*.png, each named by its subject
    IMAGES/partners/contents/*.png    for Break-for-Make: pictures of other subjects and of other styles, each with its
    IMAGES/partners/styles/*.png      prompt in NAME.txt

In names, `_` and `-` stand for spaces. The text in NAME.txt beside a picture or folder replaces its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unbraid.bench.truth.tasks import Cell
from unbraid.bench.truth.truths import Truth
from unbraid.common.atomic import sha256
from unbraid.common.errors import UsageError
from unbraid.images.captions import caption_of
from unbraid.images.folders import SUFFIXES, list_images

Pictures = tuple[Truth, ...]
LAYOUT = "Make contents/NAME/*.png and styles/'cat in ink.png': see docs/field-metrics.md."


@dataclass(frozen=True)
class Given:
    """`contents`: subject → its pictures. `styles`: style → its pictures; the first one is trained on, drawings are compared with all.
    `partners`: kind of module → (picture of the other kind, prompt)."""

    contents: Mapping[str, Pictures]
    styles: Mapping[str, Pictures]
    partners: Mapping[str, tuple[tuple[Truth, str], ...]]

    def hashes(self, cell: Cell) -> list[str]:
        """Hashes of the pictures that a cell's drawings and scores depend on."""
        subject = self.contents[cell.subject] if cell.task == "combine" else (cell.content,)
        some = [
            *subject,
            *self.styles[cell.style.style],
            *(truth for kind in self.partners.values() for truth, _ in kind),
        ]
        return [sha256(truth.file) for truth in some if truth.file]


def read_given(images: Path) -> Given:
    """Read a folder with the layout above. Errors: no pictures, two subjects or styles of one name, a picture of a style whose name lacks
    the subject or the style."""
    contents = {name: _pictures(path, name) for path, name in _named(images / "contents").items()}
    styles: dict[str, Pictures] = {}
    for path, name in _named(images / "styles").items():
        style, pictures = _style(path, name)
        if style in styles:
            raise UsageError(
                f"there are two styles {style!r}", path, "Put their pictures into one folder of that name."
            )
        styles[style] = pictures
    if not contents and not styles:
        raise UsageError("there are no contents and no styles", images, LAYOUT)
    partners = {
        "content": _partners(images / "partners" / "styles"),
        "style": _partners(images / "partners" / "contents"),
    }
    return Given(contents, styles, {kind: some for kind, some in partners.items() if some})


def _named(folder: Path) -> dict[Path, str]:
    """Picture, or folder of pictures → its name."""
    if not folder.is_dir():
        return {}
    found = sorted(path for path in folder.iterdir() if path.is_dir() or path.suffix.lower() in SUFFIXES)
    names = {path: caption_of(path) or words(path) for path in found}
    for path, name in names.items():
        if list(names.values()).count(name) > 1:
            raise UsageError(f"there are two of the name {name!r}", path, "Give one another name.")
    return names


def words(path: Path) -> str:
    """The words of a file name: `red_dog-2.png` → red dog 2."""
    name = path.name if path.is_dir() else path.stem
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def _pictures(path: Path, subject: str) -> Pictures:
    return tuple(Truth(subject, f"picture {i + 1}", file) for i, file in enumerate(list_images(path)))


def _style(path: Path, name: str) -> tuple[str, Pictures]:
    """The words for a style, and its pictures. A folder is named by the style, and each picture in it by its subject."""
    if path.is_dir():
        shown = {file: _shown(caption_of(file) or words(file))[0] for file in list_images(path)}
        return name, tuple(Truth(subject, name, file) for file, subject in shown.items())
    subject, style = _shown(name)
    if not style:
        fix = f'Call it "cat in ink{path.suffix}", or write "a cat in ink style" to {path.stem}.txt.'
        raise UsageError("its name does not give a subject and a style", path, fix)
    return style, (Truth(subject, style, path),)


def _shown(text: str) -> tuple[str, str]:
    """`a cat in ink style` → cat, ink."""
    subject, _, style = text.rpartition(" in ") if " in " in text else (text, "", "")
    for article in ("a ", "an ", "the "):
        subject = subject.removeprefix(article)
    return subject.strip(), style.removesuffix(" style").strip()


def _partners(folder: Path) -> tuple[tuple[Truth, str], ...]:
    if not folder.is_dir():
        return ()
    out = []
    for i, file in enumerate(list_images(folder)):
        text = caption_of(file)
        if text is None:
            raise UsageError("a partner picture without its prompt", file, f"Write it to {file.stem}.txt.")
        out.append((Truth(text, f"partner {i + 1}", file), text))
    return tuple(out)
