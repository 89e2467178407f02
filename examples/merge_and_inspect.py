"""Train two small LoRAs, merge their files into one, and look at what is in it. Merging and inspecting need no base model."""

import sys
from importlib.resources import files
from pathlib import Path

from PIL import ImageOps

import unbraid
from unbraid.files.merge import Size
from unbraid.files.report import interference, report
from unbraid.files.tools import Source, merge_files
from unbraid.images.opening import open_image
from unbraid.images.sheets import save_image

PICTURE = Path(str(files("unbraid") / "bases" / "icons" / "example.png"))


def main(out: Path) -> None:
    negative = save_image(ImageOps.invert(open_image(PICTURE)), out / "negative.png")
    fox, dark = (
        unbraid.learn(picture, prompt=prompt, steps=60, rank=4, previews=0, out=out / name) / "lora.safetensors"
        for name, picture, prompt in (
            ("fox", PICTURE, "a sks fox"),
            ("dark", negative, "a fox in negative style"),
        )
    )

    # concat is exact: the merged file does what both files do when they are loaded together at these strengths.
    merged = out / "merged.safetensors"
    merge_files([Source(fox, 0.8), Source(dark, 0.5)], merged)
    # ties resolves entries whose signs disagree; Size limits the rank of the result.
    small = out / "ties.safetensors"
    merge_files([Source(fox, 0.8), Source(dark, 0.5)], small, "ties", Size(rank=4), density=0.3)

    for file in (fox, dark, merged, small):
        found = report(file)
        modules = sum(found.ranks.values())
        print(f"{file}: {found.family}, {modules} modules, ranks {', '.join(map(str, found.ranks))}")
    worst = max(interference(fox, dark), key=lambda found: abs(found.cosine))
    print(f"the two LoRAs are most alike in block {worst.block}: cosine {worst.cosine:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "merge_and_inspect"))
