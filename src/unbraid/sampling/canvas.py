"""The image inputs of a drawing: a start picture (image to image), a mask on it (inpainting), or a ControlNet map."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.models.controlnets.controlnet import ControlNetModel
from PIL import Image

from unbraid.bases.base import Base
from unbraid.bases.pipeline import known_model
from unbraid.common.errors import UsageError, first_line
from unbraid.images.crop import cropped, open_image
from unbraid.images.opening import whole_size


@dataclass(frozen=True)
class Start:
    """A picture to start from.

    `strength`: the share of the noise that is added to it; at 1 nothing of the picture is left.
    `mask`: a picture of the same size. White areas are redrawn, black areas are kept."""

    image: Path
    strength: float = 0.6
    mask: Path | None = None


@dataclass(frozen=True)
class Control:
    """A ControlNet (a diffusers folder or hub id), its input map (edges, depth, a pose), and its strength."""

    model: str
    image: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Canvas:
    """A diffusers pipeline, and the arguments for its call other than prompts, steps and seeds."""

    pipe: Any
    given: Mapping[str, Any]

    @property
    def width(self) -> int:
        return self.given["width"] if "width" in self.given else self.given["image"].size[0]

    @property
    def height(self) -> int:
        return self.given["height"] if "height" in self.given else self.given["image"].size[1]


def prepare(base: Base, start: Start | None, control: Control | None, height: int | None, width: int | None) -> Canvas:
    """Choose the pipeline and its arguments. Raises UsageError for a size that cannot be drawn.

    The size in pixels is that of the start picture, if there is one. Otherwise it is `width` × `height`, with the
    base's size in place of a missing one. If both are missing, a ControlNet map gives the size."""
    given = _begin(base, start) if start else {}
    map_ = _upright(base, control.image) if control else None
    size = (width or base.size, height or base.size)
    grain = base.pipe.vae_scale_factor * base.family.network.patch
    if any(side < base.step or side % grain for side in size):
        fix = f"Give multiples of {base.step}."
        raise UsageError(f"{size[0]}×{size[1]} pixels cannot be drawn", "--width, --height", fix)
    if start:
        size = given["image"].size
    elif map_ and not (height or width):
        size = map_.size
    sized = {"width": size[0], "height": size[1]}
    if not start and not control:
        return Canvas(base.pipe, {**given, **sized})
    from diffusers.pipelines import auto_pipeline  # imports every pipeline: most drawings need none of them

    kind, more = auto_pipeline.AutoPipelineForText2Image, {}
    if start:
        kind = auto_pipeline.AutoPipelineForInpainting if start.mask else auto_pipeline.AutoPipelineForImage2Image
    if control and map_:
        given["control_image" if start else "image"] = map_.resize(size)
        given["controlnet_conditioning_scale"] = control.scale
        more["controlnet"] = load_control(base, control.model)
    pipe: Any = kind.from_pipe(base.pipe, **more)
    pipe.set_progress_bar_config(disable=True)
    takes = inspect.signature(type(pipe).__call__).parameters  # image to image with a UNet takes no size
    return Canvas(pipe, given | sized if "height" in takes else given)


def _begin(base: Base, start: Start) -> dict[str, Any]:
    if not 0 < start.strength <= 1:
        raise UsageError(f"a strength of {start.strength}", "--strength", "Give more than 0, and 1 at most.")
    given: dict[str, Any] = {"image": _upright(base, start.image), "strength": start.strength}
    if start.mask:
        picture, mask = open_image(start.image), open_image(start.mask)
        (w, h), (mask_w, mask_h) = whole_size(picture), whole_size(mask)
        if (w, h) != (mask_w, mask_h):
            what = f"the mask is {mask_w}×{mask_h}, the picture {w}×{h}"
            raise UsageError(what, start.mask, "Give a mask of the picture's size.")
        given["mask_image"] = _upright(base, start.mask).convert("L")
        if np.asarray(given["mask_image"]).max() < 128:
            fix = "Make white what is to be drawn anew."
            raise UsageError("the mask is black: there is nothing to draw anew", start.mask, fix)
    return given


def _upright(base: Base, file: Path) -> Image.Image:
    """Open a picture, upright, and crop and resize it to a size that the base accepts."""
    return cropped(open_image(file), base.size**2, base.step, file)[0]


def load_control(base: Base, name: str) -> ControlNetModel:
    """Load a ControlNet. Raises UsageError if it was made for another kind of base."""
    if not base.family.network.control_keys:
        what = f"ControlNets for a {base.family.network.title} are not supported"
        raise UsageError(what, name, "Leave out --controlnet.")
    known_model(name, "ControlNet", "Give a diffusers folder, or a hub id such as diffusers/controlnet-canny-sdxl-1.0.")
    try:
        model = ControlNetModel.from_pretrained(name, torch_dtype=base.dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        fix = "Give a complete diffusers folder with .safetensors weights, or a hub id."
        raise UsageError(f"the ControlNet cannot be loaded: {first_line(error)}", name, fix) from error
    for key in base.family.network.control_keys:
        if _plain(model.config[key]) != _plain(base.denoiser.config[key]):
            what = f"its {key} is {model.config[key]}, the base's {base.denoiser.config[key]}"
            raise UsageError(what, name, f"It was made for another base than {base.name}.")
    model.to(base.device)  # type: ignore[call-arg]
    return model.requires_grad_(False).eval()


def _plain(value: Any) -> Any:
    """Turn tuples into lists: configuration files only have lists, so this makes the two comparable."""
    return list(value) if isinstance(value, list | tuple) else value
