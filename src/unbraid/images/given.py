"""Pictures that are given in Python: a path, or a PIL image, which is saved so that a run can record it and be resumed."""

import hashlib
from pathlib import Path

from PIL.Image import Image

from unbraid.images.sheets import save_image

Source = str | Path | Image
FOLDER = Path("runs") / "pictures"


def as_file(source: Source) -> Path:
    """The path of a picture or folder. A PIL image is saved as a PNG in runs/pictures, named by a hash of its contents."""
    if not isinstance(source, Image):
        return Path(source)
    data = f"{source.mode} {source.size}".encode() + source.tobytes()
    file = FOLDER / f"{hashlib.sha256(data).hexdigest()[:12]}.png"
    return file if file.exists() else save_image(source, file)
