"""LoRA files and a prompt → pictures."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from unbraid.bases.base import Base
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import UsageError
from unbraid.core.lora import Active
from unbraid.files.lora_file import LoraFile, read
from unbraid.images.crop import fit, open_image
from unbraid.sampling.attach import Loras, attach
from unbraid.sampling.canvas import Canvas, Control, Start, prepare
from unbraid.sampling.combine import Combine, composite, k_lora_terms, sampling_times, switch
from unbraid.sampling.invert import invert
from unbraid.sampling.sample import NEGATIVE, Style, Term, generate, style_guidance
from unbraid.sampling.samplers import with_sampler

OWN = "own"  # a value of Use.prompt: stands for the prompt that the file was trained with


@dataclass(frozen=True)
class Use:
    """One LoRA file and its strength.

    `prompt`: the text that this LoRA gets in the keys and values of cross-attention, in place of the main prompt
    (UnZipLoRA's joint inference). `own` stands for the prompt that is recorded in the file."""

    file: Path
    scale: float = 1.0
    prompt: str | None = None


@dataclass(frozen=True)
class StyleGuidance:
    """Style LoRAs that guide the drawing (arXiv 2405.01536), and leave its composition to the base.

    A `scale` of 1 means w_L = the guidance scale, which gives the style as trained. The `prompt` of a use is the name of
    the style, by default the one recorded in the file.
    `begin`: how much noise is left when they begin to guide, 1 (pure noise: always) to 0 (never)."""

    uses: Sequence[Use] = ()
    begin: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled: one per seed, with classifier-free guidance.

    `sampler`: a name in `unbraid.sampling.samplers`; empty: the base's own. `height`, `width`: in pixels; None: the base's
    size."""

    guidance: float = 4.0
    steps: int = 25
    sampler: str = ""
    seeds: Sequence[int] = (0,)
    height: int | None = None
    width: int | None = None
    negative: str = ""  # the negative prompt
    embedded: float = 1.0  # the guidance scale that a distilled denoiser takes as an input, such as Flux.1-dev's


@dataclass(frozen=True)
class ImageInputs:
    """Pictures that the drawing depends on.

    `start`, `control`: a start picture and a ControlNet, see `unbraid.sampling.canvas`.
    `edit`: a picture to apply the styles to, instead of drawing a new one. The prompt describes it. It is inverted to
    noise, and style guidance moves the drawing away from it: at strength 0 the same picture comes back."""

    start: Start | None = None
    control: Control | None = None
    edit: Path | None = None


@dataclass(frozen=True)
class _Cast:
    """The LoRAs and styles of a drawing, role → its use and its opened file; and all prompts, role → text."""

    loras: Mapping[str, tuple[Use, LoraFile]]
    styles: Mapping[str, tuple[Use, LoraFile]]
    texts: Mapping[str, str]


def render(
    base: Base,
    prompt: str,
    uses: Sequence[Use] = (),
    *,
    combine: Combine = "sum",
    styles: StyleGuidance = StyleGuidance(),
    sampling: Sampling = Sampling(),
    inputs: ImageInputs = ImageInputs(),
) -> list[Image.Image]:
    """One picture per seed. The base is left unchanged.

    `uses`: the LoRAs in the model. `combine`: how several of them work together, see `unbraid.sampling.combine`.
    UsageError if the settings do not fit together."""
    _check(uses, combine, styles, sampling, inputs)
    base = with_sampler(base, sampling.sampler) if sampling.sampler else base
    base = replace(base, guidance=sampling.embedded) if sampling.embedded != base.guidance else base
    cast = _cast(prompt, uses, styles.uses)
    if not base.family.network.layers.own_prompt and (own := cast.texts.keys() & cast.loras.keys()):
        what = f"the attention of a {base.family.network.title} reads one prompt: a LoRA cannot have its own"
        raise UsageError(what, cast.loras[min(own)][0].file, "Leave out --lora-prompt.")
    prompts = {role: base.encode_prompt(text) for role, text in cast.texts.items()}
    prompts[NEGATIVE] = base.encode_negative(sampling.negative)
    prompts = base.alike(prompts)
    guides = [
        Style(Active(role), role, use.scale * sampling.guidance, styles.begin) for role, (use, _) in cast.styles.items()
    ]
    loras: Loras = {role: (use.file, file.modules) for role, (use, file) in cast.styles.items()}
    if inputs.edit:
        canvas = _edited(base, inputs.edit, prompts["main"], sampling.steps)
        terms = style_guidance(1.0, "main", guides)
    else:
        canvas = prepare(base, inputs.start, inputs.control, sampling.height, sampling.width)
        unguided = "main" if sampling.negative == prompt else NEGATIVE
        terms, parts = _together(base, cast, combine, sampling, guides, unguided, canvas)
        loras = {**loras, **parts}
    adapters = attach(base, loras)
    try:
        return generate(base, terms, prompts, adapters, seeds=sampling.seeds, steps=sampling.steps, canvas=canvas)
    finally:
        if adapters:
            adapters.detach()


def _check(
    uses: Sequence[Use], combine: Combine, styles: StyleGuidance, sampling: Sampling, inputs: ImageInputs
) -> None:
    """Raise UsageError if the settings do not fit together."""
    start, sized = inputs.start, bool(sampling.height or sampling.width)
    if styles.uses and combine != "sum":
        raise UsageError(f"style guidance does not go with {combine}", "generate", "Leave --combine at sum.")
    if not 0 <= styles.begin <= 1:
        raise UsageError(f"a start of {styles.begin}", "--style-from", "Give 1 (always) to 0 (never).")
    unfit = uses or sampling.negative or len(sampling.seeds) > 1 or sized or sampling.sampler
    if inputs.edit and (unfit or start or inputs.control):
        fix = "Leave out LoRAs, negative prompt, size, seeds, sampler, --from and --controlnet: styles alone change it."
        raise UsageError("an edited picture keeps what it is", inputs.edit, fix)
    if start and sized:
        fix = "Leave out --height and --width, or resize the picture."
        raise UsageError("a drawing that starts from a picture has its size", start.image, fix)
    if start and start.strength > 0 and int(sampling.steps * start.strength) < 1:
        what = f"a strength of {start.strength} leaves none of {sampling.steps} steps"
        raise UsageError(what, "--strength", "Raise it, or --steps.")


def _cast(prompt: str, uses: Sequence[Use], styles: Sequence[Use]) -> _Cast:
    opened = {f"lora{i}": (use, read(use.file)) for i, use in enumerate(uses)}
    guides = {f"style{i}": (use, read(use.file)) for i, use in enumerate(styles)}
    texts = {"main": prompt}
    for role, (use, file) in opened.items():
        if use.prompt is not None:
            texts[role] = own_prompt(use.file, file) if use.prompt == OWN else use.prompt
    for role, (use, file) in guides.items():
        texts[role] = f"{prompt} in {use.prompt or style_words(use.file, file)} style"
    return _Cast(opened, guides, texts)


def _together(
    base: Base,
    cast: _Cast,
    combine: Combine,
    sampling: Sampling,
    styles: Sequence[Style],
    unguided: str,
    canvas: Canvas,
) -> tuple[tuple[Term, ...], Loras]:
    """The guidance terms, and the LoRAs to attach apart from the style LoRAs. K-LoRA splits its two into parts."""
    guidance = sampling.guidance
    active = [
        Active(role, use.scale, prompt=role if role in cast.texts else None) for role, (use, _) in cast.loras.items()
    ]
    loras: Loras = {role: (use.file, file.modules) for role, (use, file) in cast.loras.items()}
    if combine == "sum" or not active:
        return style_guidance(guidance, "main", styles, tuple(active), unguided), loras
    if combine == "composite":
        return composite(guidance, "main", active), loras
    size = canvas.height // base.pipe.vae_scale_factor, canvas.width // base.pipe.vae_scale_factor
    times = sampling_times(base.family.network, copy.deepcopy(base.pipe.scheduler), sampling.steps, size)
    if combine == "switch":
        return switch(guidance, "main", active, times), loras
    parts, terms = k_lora_terms(guidance, "main", active, [modules for _, modules in loras.values()], times)
    return terms, {name: (loras[name.rpartition("_")[0]][0], modules) for name, modules in parts.items()}


def _edited(base: Base, file: Path, prompt: Prompt, steps: int) -> Canvas:
    """A canvas that starts from the inverted noise of a picture, with the sampler that undoes the inversion."""
    pixels = fit(open_image(file), base.size**2, base.step, file)
    height, width = pixels.values.shape[1:]
    pipe = with_sampler(base, base.process.sampler).pipe
    noise = base.family.network.packed(invert(base, pixels, prompt, steps))
    return Canvas(pipe, {"latents": noise, "height": height, "width": width})


def own_prompt(path: Path, file: LoraFile) -> str:
    """The prompt that a LoRA was trained with, from its metadata. UsageError if none is recorded."""
    for key in ("unbraid.prompt", "modelspec.trigger_phrase"):
        if file.metadata.get(key):
            return file.metadata[key]
    raise UsageError("records no prompt of its own", path, "Say what it was trained with: see --help for the option.")


def style_words(path: Path, file: LoraFile) -> str:
    """The name of a style LoRA's style, from its metadata. UsageError if none is recorded."""
    if file.metadata.get("unbraid.style"):
        return file.metadata["unbraid.style"]
    raise UsageError("does not say what its style is called", path, "Say it: --style-prompt WORDS.")
