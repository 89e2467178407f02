"""Split one picture into a content LoRA and a style LoRA, then draw with each of them and with both."""

import sys
from importlib.resources import files
from pathlib import Path

import unbraid
from unbraid.images.opening import open_image
from unbraid.images.sheets import contact_sheet, save_image
from unbraid.sampling.uses import OWN, Use

PICTURE = Path(str(files("unbraid") / "bases" / "icons" / "example.png"))  # a fox, which the base was not trained on


def main(out: Path) -> None:
    run = unbraid.split(PICTURE, subject="fox", style="line art", steps=150, previews=0, out=out / "run")
    content, style = run / "content.safetensors", run / "style.safetensors"

    # The content LoRA knows its subject as "sks fox": a rare word, and the class.
    cartoon = unbraid.generate("a sks fox in cartoon style", [content])
    # The style LoRA goes with any subject.
    teapot = unbraid.generate("a teapot in line art style", [style])
    # Both at once. In cross-attention each LoRA reads the prompt that it was trained with.
    both = unbraid.generate("a sks fox in line art style", [Use(content, prompt=OWN), Use(style, prompt=OWN)])

    row = [("input", open_image(PICTURE)), ("content", cartoon[0]), ("style", teapot[0]), ("both", both[0])]
    for file in (content, style, save_image(contact_sheet([("split", row)]), out / "sheet.png")):
        print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "split_and_draw"))
