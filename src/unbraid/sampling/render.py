"""LoRA files and a prompt → pictures."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from unbraid.bases.base import Base
from unbraid.bases.families.family import Prompt
from unbraid.bases.families.segments import PLUS, segmented
from unbraid.common.errors import UsageError
from unbraid.core.lora import Active
from unbraid.images.crop import fit, open_image
from unbraid.sampling.attach import attach
from unbraid.sampling.canvas import Canvas, Control, Start, prepare
from unbraid.sampling.combine import (
    RULES,
    Combine,
    by_choice,
    by_step,
    composite,
    difference,
    sampling_times,
    switch,
    within,
)
from unbraid.sampling.invert import invert
from unbraid.sampling.sample import NEGATIVE, Style, Term, generate, style_guidance
from unbraid.sampling.samplers import with_sampler
from unbraid.sampling.uses import ALL_STEPS, Cast, Loras, Use, away, check_uses, open_uses, toward


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
    check_uses(uses, styles.uses, combine, sampling.steps)
    base = with_sampler(base, sampling.sampler) if sampling.sampler else base
    base = replace(base, guidance=sampling.embedded) if sampling.embedded != base.guidance else base
    cast = open_uses(prompt, uses, styles.uses)
    layers, own = base.family.network.layers, [role for role in cast.loras if role in cast.texts]
    if own and not (layers.own_prompt or layers.text):
        what = f"the attention of a {base.family.network.title} reads one prompt: a LoRA cannot have its own"
        raise UsageError(what, cast.loras[own[0]][0].file, "Leave out --lora-prompt.")
    prompts = {role: base.encode_prompt(text) for role, text in cast.texts.items()}
    prompts[NEGATIVE] = base.encode_negative(sampling.negative)
    prompts = base.alike(prompts)
    if own and layers.text:
        prompts["main"] = segmented(PLUS.join(("main", *own)), prompts)
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


def _together(
    base: Base,
    cast: Cast,
    combine: Combine,
    sampling: Sampling,
    styles: Sequence[Style],
    unguided: str,
    canvas: Canvas,
) -> tuple[tuple[Term, ...], Loras]:
    """The guidance terms, and the LoRAs to attach apart from the style LoRAs. K-LoRA splits its two into parts."""
    guidance = sampling.guidance
    own = [role for role in cast.loras if role in cast.texts]
    places = {role: (i, len(own) + 1) for i, role in enumerate(own, 1)} if base.family.network.layers.text else {}
    active = [
        Active(role, use.scale, prompt=role if role in own else None, segment=places.get(role))
        for role, (use, _) in cast.loras.items()
    ]
    loras = cast.attached()
    size = canvas.height // base.pipe.vae_scale_factor, canvas.width // base.pipe.vae_scale_factor
    times = sampling_times(base.family.network, copy.deepcopy(base.pipe.scheduler), sampling.steps, size)
    if combine == "sum" or not active:
        formula = partial(style_guidance, guidance, "main", styles, negative=unguided)
        return _summed(cast, active, times, formula), loras
    if combine == "composite":
        return composite(guidance, "main", active), loras
    if combine == "switch":
        return switch(guidance, "main", active, times), loras
    some = [modules for _, modules in loras.values()]
    parts, terms = by_choice((guidance, "main"), RULES[combine], active, some, times)
    return terms, {name: (loras[name.rpartition("_")[0]][0], modules) for name, modules in parts.items()}


def _summed(
    cast: Cast, active: Sequence[Active], times: Sequence[float], formula: Callable[..., tuple[Term, ...]]
) -> tuple[Term, ...]:
    """The terms of LoRAs that add up, each in its own part of the steps, which are at `times`, with what they are drawn
    against. `formula`: the guidance terms with some LoRAs active."""

    def terms(now: tuple[Active, ...]) -> tuple[Term, ...]:
        found = formula(active=now)
        for role in (one.adapter for one in now if one.adapter in cast.against):
            use, _ = cast.loras[role]
            near, far = (toward(role), Active(role, use.scale)), (away(role), Active(away(role), use.scale))
            found += difference(use.contrast, near, far)
        return found

    windows = [use.steps for use, _ in cast.loras.values()]
    if all(window == ALL_STEPS for window in windows):
        return terms(tuple(active))
    return by_step(within(active, windows, len(times)), times, terms)


def _edited(base: Base, file: Path, prompt: Prompt, steps: int) -> Canvas:
    """A canvas that starts from the inverted noise of a picture, with the sampler that undoes the inversion."""
    pixels = fit(open_image(file), base.size**2, base.step, file)
    height, width = pixels.values.shape[1:]
    pipe = with_sampler(base, base.process.sampler).pipe
    noise = base.family.network.packed(invert(base, pixels, prompt, steps))
    return Canvas(pipe, {"latents": noise, "height": height, "width": width})
