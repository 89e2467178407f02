"""Drawing in the studio's process: a base that stays loaded, and pictures that are kept in the studio's folder."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from unbraid.bases.base import Base, load
from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError
from unbraid.images.opening import open_alpha, open_image
from unbraid.images.sheets import save_image
from unbraid.runs.roles import in_roles
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, Use, render
from unbraid.sampling.sweep import parse_sweep, sweep_sheet
from unbraid.studio.safety import Home

_lock = threading.Lock()
_loaded: dict[str, Base] = {}  # the base that was used last


@dataclass(frozen=True)
class Drawing:
    """What to draw. `sweep`: as `--sweep` of the command line; empty: a picture per seed. `roles`: of the `uses`, as for
    `runs.roles.in_roles`."""

    prompt: str
    base: str = "icons"
    uses: tuple[Use, ...] = ()
    combine: Combine = "sum"
    styles: StyleGuidance = field(default_factory=StyleGuidance)
    sampling: Sampling = field(default_factory=Sampling)
    inputs: ImageInputs = field(default_factory=ImageInputs)
    sweep: str = ""
    roles: tuple[str, ...] = ()


@contextmanager
def using(name: str) -> Iterator[Base]:
    """A base, for one user at a time. It is loaded when it is first used, and the one before it is given up."""
    with _lock:
        if name not in _loaded:
            _loaded.clear()
            _loaded[name] = load(name)
        yield _loaded[name]


def pictures(drawing: Drawing) -> list[Image.Image]:
    """One picture per seed, or the one sheet of a sweep. One drawing at a time; UsageError as from `generate`."""
    over = parse_sweep(drawing.sweep) if drawing.sweep else None
    with using(drawing.base) as base:
        how = {"combine": drawing.combine, "styles": drawing.styles}
        more = {"sampling": drawing.sampling, "inputs": drawing.inputs}
        uses = in_roles(drawing.uses, drawing.roles, base)
        if over:
            return [sweep_sheet(base, drawing.prompt, over, uses, **how, **more)]
        return render(base, drawing.prompt, uses, **how, **more)


def drawn(home: Home, drawing: Drawing) -> list[Path]:
    """Draw, and keep the pictures in the studio's folder `sheets`. Returns their files."""
    made = pictures(drawing)
    return [save_image(one, home.new_file("sheets", drawing.prompt, ".png")) for one in made]


def mask_of(home: Home, picture: Path, layers: Sequence[Path]) -> Path | None:
    """What was painted over a picture as a mask of its size: white where any layer is painted. None if nothing is."""
    size = open_image(picture).size
    mask = Image.new("L", size)
    for layer in layers:
        painted = open_alpha(layer).resize(size).point([255 if opacity > 20 else 0 for opacity in range(256)])
        mask.paste(255, (0, 0), painted)
    if not mask.getbbox():
        return None
    path = home.folder / "inputs" / f"{picture.stem}-mask.png"
    with atomic(path) as part:
        mask.save(part)
    return path


def stored(home: Home, part: object) -> Path | None:
    """A piece of a painted picture, as the browser sends it: a file in the cache, or bytes, which are written there."""
    if not part:
        return None
    if isinstance(part, bytes):
        path = home.new_file("cache", "painted", ".png")
        path.write_bytes(part)
        return path
    path = Path(str(part))
    if not home.contains(path):
        raise UsageError("this is not an uploaded file", path.name, "Upload it again.")
    return path
