"""`generate` in Python."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from unbraid.bases.base import Base, load
from unbraid.bases.presets import Loading
from unbraid.runs.preferences import base_for
from unbraid.runs.roles import checked_roles, in_roles
from unbraid.runs.settings import counted
from unbraid.sampling.canvas import Control, Start
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, render
from unbraid.sampling.uses import Use


def generate(
    prompt: str,
    loras: Use | str | Path | Sequence[Use | str | Path] = (),
    *,
    lora_roles: str | Sequence[str] = (),
    blocks: str = "",
    combine: Combine = "sum",
    styles: Sequence[Use] = (),
    style_from: float = 1.0,
    negative: str = "",
    guidance: float = 4.0,
    embedded_guidance: float = 1.0,
    n: int | None = None,
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    sampler: str = "",
    height: int | None = None,
    width: int | None = None,
    start: Start | None = None,
    control: Control | None = None,
    edit: Path | None = None,
    base: str = "",
    vae: str = "",
    parts: str = "",
    prediction: str = "",
    vram: str = "max",
    swap: int = 0,
    graphs: bool = True,
    device: str = "",
) -> list[Image.Image]:
    """Pictures of a prompt with LoRA files, one per seed; with `n`, at the seeds 0 to n - 1.

    `base`: by default the one that all the LoRAs record, if it is there, else that of `preferences.default_base`. It is kept in memory
    until another one is needed, or a training run begins.
    `lora_roles`, `blocks`: those of `unbraid.runs.roles.in_roles`: with "content" or "style" for each LoRA, it leaves out the layers of the other
    role. `combine`: how several LoRAs work together, see `unbraid.sampling.combine`. `styles`, `style_from`: the fields of
    `render.StyleGuidance`. `negative` to `width`: those of `render.Sampling`. `start`, `control`, `edit`: those of
    `render.ImageInputs`. `vae`, `parts`, `prediction`, `vram`, `swap`, `graphs` and `device`: those of `presets.Loading`."""
    some = [loras] if isinstance(loras, Use | str | Path) else loras
    uses = [one if isinstance(one, Use) else Use(Path(one)) for one in some]
    roles = checked_roles([lora_roles] if isinstance(lora_roles, str) else lora_roles, len(uses), blocks)
    counted("steps", steps, range(1, 1001))
    seeds = seeds if n is None else range(counted("n", n, range(1, 10_001)))
    name = base or base_for(use.file for use in (*uses, *styles))
    model = _opened(name, Loading(vae, prediction, parts, vram, graphs=graphs, device=device, swap=swap))
    return render(
        model,
        prompt,
        in_roles(uses, roles, model, blocks),
        combine=combine,
        styles=StyleGuidance(styles, style_from),
        sampling=Sampling(guidance, steps, sampler, seeds, height, width, negative, embedded_guidance),
        inputs=ImageInputs(start, control, edit),
    )


@lru_cache(1)
def _opened(name: str, loading: Loading) -> Base:
    return load(name, loading=loading)


def forget_base() -> None:
    """Free the memory of the base that `generate` keeps."""
    _opened.cache_clear()
