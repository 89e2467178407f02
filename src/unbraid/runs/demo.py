"""The demo: split a picture that the embedded base was not trained on, and draw with the two LoRAs in every way."""

from importlib.resources import files
from pathlib import Path

from PIL import Image

from unbraid.bases.base import load
from unbraid.images import sheets
from unbraid.images.crop import open_image
from unbraid.runs import showcase
from unbraid.runs.api import split_job
from unbraid.runs.job import RARE, Job
from unbraid.sampling.render import Sampling, render
from unbraid.sampling.uses import OWN, Use

SUBJECT, STYLE = "fox", "line art"
NEXT = 'generate --lora {out}/style.safetensors --lora-role style --prompt "a violin in line art style" --n 4 --out {out}/violins'


def image() -> Path:
    return Path(str(files("unbraid.bases").joinpath("icons", "example.png")))


def job(out: Path) -> Job:
    # no previews: `sheet` draws more than the run's own sheet would
    return split_job(image(), subject=SUBJECT, style=STYLE, out=out, base="icons", previews=0)


def sheet(out: Path) -> Path:
    """Draw a sheet with the two LoRAs in `out`: the subject in other styles, other subjects in its style, and both."""
    base, content, style = load("icons"), out / "content.safetensors", out / "style.safetensors"

    def draw(prompt: str, *uses: Use) -> tuple[str, Image.Image]:
        return prompt, render(base, prompt, uses)[0]

    both = f"a {RARE} {SUBJECT} in {STYLE} style"
    other_styles, other_subjects = showcase.rows(job(out))
    rows = [
        (
            "the picture that was split; the base has never seen it. Beside it: what the base draws without LoRAs",
            [("input", open_image(image())), draw(both)],
        ),
        (
            f"content LoRA: the same {SUBJECT} in other styles",
            [draw(prompt, Use(content)) for prompt in other_styles.prompts.values()],
        ),
        (
            f"style LoRA: other things as {STYLE}, like the picture",
            [draw(prompt, Use(style)) for prompt in other_subjects.prompts.values()],
        ),
        (
            "both LoRAs together: the picture drawn again, four times",
            [
                (f"seed {i}", picture)
                for i, picture in enumerate(
                    render(
                        base,
                        both,
                        (Use(content, prompt=OWN), Use(style, prompt=OWN)),
                        sampling=Sampling(seeds=range(4)),
                    )
                )
            ],
        ),
    ]
    return sheets.save_image(sheets.contact_sheet(rows, cell=192), out / "demo.png")
