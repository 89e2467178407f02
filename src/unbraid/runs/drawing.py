"""`generate` in Python."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unbraid.bases.base import load
from unbraid.bases.presets import Loading
from unbraid.sampling.canvas import Control, Start
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, Use, render


def generate(
    prompt: str,
    loras: Sequence[Use | str | Path] = (),
    *,
    combine: Combine = "sum",
    styles: Sequence[Use] = (),
    style_from: float = 1.0,
    negative: str = "",
    guidance: float = 4.0,
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    sampler: str = "",
    height: int | None = None,
    width: int | None = None,
    start: Start | None = None,
    control: Control | None = None,
    edit: Path | None = None,
    base: str = "icons",
    vae: str = "",
    prediction: str = "",
    graphs: bool = True,
    device: str = "",
) -> list[Image.Image]:
    """Pictures of a prompt with LoRA files, one per seed.

    `combine`: how several LoRAs work together, see `unbraid.sampling.combine`. `styles`, `style_from`: the fields of
    `render.StyleGuidance`. `negative` to `width`: those of `render.Sampling`. `start`, `control`, `edit`: those of
    `render.ImageInputs`. `vae`, `prediction`, `graphs` and `device`: those of `presets.Loading`."""
    uses = [one if isinstance(one, Use) else Use(Path(one)) for one in loras]
    return render(
        load(base, loading=Loading(vae, prediction, graphs=graphs, device=device)),
        prompt,
        uses,
        combine=combine,
        styles=StyleGuidance(styles, style_from),
        sampling=Sampling(guidance, steps, sampler, seeds, height, width, negative),
        inputs=ImageInputs(start, control, edit),
    )
