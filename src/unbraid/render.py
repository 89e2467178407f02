"""LoRA files and a prompt → pictures."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unbraid.adapters import Adapters
from unbraid.base import Base
from unbraid.combine import Combine, composite, k_lora_terms, sampling_times, switch
from unbraid.data import fit, open_image
from unbraid.errors import UsageError
from unbraid.files import LoraFile, read
from unbraid.invert import invert, with_ddim
from unbraid.lora import Active, Factors, Lora
from unbraid.sample import NEGATIVE, Style, generate, style_guidance

OWN = "own"  # as a Use.prompt: the prompt that the file was trained with


@dataclass(frozen=True)
class Use:
    """One LoRA file at a strength. `prompt`: what it reads in cross-attention keys and values instead of the main
    prompt (UnZipLoRA's joint inference); `own` is the prompt recorded in the file."""

    file: Path
    scale: float = 1.0
    prompt: str | None = None


def render(
    base: Base,
    prompt: str,
    uses: Sequence[Use] = (),
    *,
    styles: Sequence[Use] = (),
    style_from: float = 1.0,
    combine: Combine = "sum",
    negative: str = "",
    guidance: float = 4.0,
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    height: int | None = None,
    width: int | None = None,
    edit: Path | None = None,
) -> list[Image.Image]:
    """One picture per seed with classifier-free guidance; the base is left as it was.

    `styles` guide beside it (style guidance, arXiv 2405.01536): a `scale` of 1 is w_L = `guidance`, which gives the style as it was
    trained; their `prompt` is the style's words, by default those that their files record. They count from the time `style_from`,
    1 (pure noise) to 0. `edit`: a picture, which `prompt` describes, to apply the styles to, instead of drawing one: it is inverted, and
    styles guide away from it; at strength 0 it comes back. `combine`: how several LoRAs work together, see `unbraid.combine`."""
    if styles and combine != "sum":
        raise UsageError(f"style guidance does not go with {combine}", "generate", "Leave --combine at sum.")
    if not 0 <= style_from <= 1:
        raise UsageError(f"a start of {style_from}", "--style-from", "Give 1 (always) to 0 (never).")
    if edit and (uses or negative or len(seeds) > 1 or height or width):
        fix = "Leave out LoRAs, negative prompt, size, and further seeds: styles alone change it."
        raise UsageError("an edited picture keeps what it is", edit, fix)
    opened = {f"lora{i}": (use, read(use.file)) for i, use in enumerate(uses)}
    guides = {f"style{i}": (use, read(use.file)) for i, use in enumerate(styles)}
    texts = {"main": prompt}
    texts |= {
        name: own_prompt(use.file, file) if use.prompt == OWN else use.prompt
        for name, (use, file) in opened.items()
        if use.prompt is not None
    }
    texts |= {
        name: f"{prompt} in {use.prompt or style_words(use.file, file)} style" for name, (use, file) in guides.items()
    }
    active = [Active(name, use.scale, prompt=name if name in texts else None) for name, (use, _) in opened.items()]
    guiding = [Style(Active(name), name, use.scale * guidance, style_from) for name, (use, _) in guides.items()]
    loras = {name: (use.file, file.modules) for name, (use, file) in (opened | guides).items()}
    prompts = {role: base.encode_prompt(text) for role, text in texts.items()}
    prompts[NEGATIVE] = base.encode_negative(negative)
    times = sampling_times(copy.deepcopy(base.pipe.scheduler), steps)
    if combine == "sum" or not active:
        unguided = "main" if negative == prompt else NEGATIVE
        terms = style_guidance(guidance, "main", guiding, tuple(active), unguided)
    elif combine == "composite":
        terms = composite(guidance, "main", active)
    elif combine == "switch":
        terms = switch(guidance, "main", active, times)
    else:
        parts, terms = k_lora_terms(guidance, "main", active, [modules for _, modules in loras.values()], times)
        loras = {name: (loras[name.rpartition("_")[0]][0], modules) for name, modules in parts.items()}
    latents = None
    if edit:
        pixels = fit(open_image(edit), base.size**2, base.step, edit)
        (height, width), base = pixels.values.shape[1:], with_ddim(base)
        latents, terms = invert(base, pixels, prompts["main"], steps), style_guidance(1.0, "main", guiding)
    adapters = attach(base, loras)
    try:
        return generate(
            base, terms, prompts, adapters, seeds=seeds, steps=steps, height=height, width=width, latents=latents
        )
    finally:
        if adapters:
            adapters.detach()


def attach(base: Base, loras: Mapping[str, tuple[Path, Mapping[str, Lora]]]) -> Adapters | None:
    """Put LoRAs (their files, for errors, and modules) on the base's UNet, each under its name; None if there are none."""
    names: set[str] = set()
    for path, modules in loras.values():
        outside = [name for name in modules if not name.startswith("unet.")]
        if outside:
            what = f"{len(outside)} of its modules are not in the UNet, such as {outside[0]}"
            raise UsageError(what, path, "unbraid applies UNet LoRAs; drop the rest with `unbraid edit`.")
        names |= {name.removeprefix("unet.") for name in modules}
    if not names:
        return None
    linears = {name for name, module in base.unet.named_modules() if type(module).__name__ == "Linear"}
    for path, modules in loras.values():
        missing = sorted({name.removeprefix("unet.") for name in modules} - linears)
        if missing:
            what = (
                f"{len(missing)} of its {len(modules)} modules are no linear layers of this base, such as {missing[0]}"
            )
            raise UsageError(what, path, f"It was made for another base than {base.name}.")
    adapters = Adapters.attach_named(base.unet, sorted(names))
    try:
        for name, (path, modules) in loras.items():
            made = {}
            for module, lora in modules.items():
                made[module.removeprefix("unet.")] = Factors(
                    lora.down.float(), lora.up.float(), lora.alpha / len(lora.down)
                )
            adapters.add(name, made, where=path)
    except UsageError:
        adapters.detach()
        raise
    return adapters


def own_prompt(path: Path, file: LoraFile) -> str:
    """The prompt that a LoRA was trained with, as its file records it."""
    for key in ("unbraid.prompt", "modelspec.trigger_phrase"):
        if file.metadata.get(key):
            return file.metadata[key]
    raise UsageError("records no prompt of its own", path, "Say what it was trained with: see --help for the option.")


def style_words(path: Path, file: LoraFile) -> str:
    """What a style LoRA calls its style."""
    if file.metadata.get("unbraid.style"):
        return file.metadata["unbraid.style"]
    raise UsageError("does not say what its style is called", path, "Say it: --style-prompt WORDS.")
