"""Learn a style from one picture before and after, then apply it by style guidance at several strengths."""

import sys
from importlib.resources import files
from pathlib import Path

from PIL import ImageFilter

import unbraid
from unbraid.images.opening import open_image
from unbraid.images.sheets import contact_sheet, save_image
from unbraid.sampling.render import Use

PICTURE = Path(str(files("unbraid") / "bases" / "icons" / "example.png"))


def main(out: Path) -> None:
    before = open_image(PICTURE)
    after = before.filter(ImageFilter.CONTOUR)  # any edit of the picture that leaves everything in its place
    couple = save_image(before, out / "before.png"), save_image(after, out / "after.png")
    run = unbraid.pair(*couple, subject="fox", style="contour", steps=200, previews=0, out=out / "run")

    # Style guidance leaves the composition to the base, so the same seed gives the same teapot at every strength.
    row = [("before", before), ("after", after)]
    for strength in (0.0, 0.5, 1.0):
        styles = [Use(run / "style.safetensors", strength)]
        (picture,) = unbraid.generate("a teapot", styles=styles, seeds=(0,))
        row.append((f"strength {strength}", picture))
    for file in (run / "style.safetensors", save_image(contact_sheet([("pair", row)]), out / "sheet.png")):
        print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "style_from_a_pair"))
