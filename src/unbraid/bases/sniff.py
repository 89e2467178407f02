"""What a single-file checkpoint contains, from its header alone: kind of model, prediction type, missing parts. No tensor
is read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unbraid.common.errors import UsageError
from unbraid.files.formats.header import Header, Shape, read_header

Kind = Literal["sdxl", "sd15", "sd21"]
Prediction = Literal["epsilon", "v_prediction"]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST = UNET + "input_blocks.0.0.weight"
TEXT: Mapping[Kind, tuple[str, ...]] = {  # the prefixes of the text encoders
    "sdxl": ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."),
    "sd15": ("cond_stage_model.transformer.text_model.",),
    "sd21": ("cond_stage_model.model.",),
}
POSITIONS = (
    "embeddings.position_embedding.weight",
    "positional_embedding",
)  # the two names that a text encoder's positions can have
TAKEN = "As one file or as a diffusers folder: SDXL, SD1.5, SD2.1, Flux.1, SD3.5, Z-Image."
LORA = re.compile(r"(^|[._])(lora|hada|lokr|oft)_|\.lora\.|_lora\.")
OTHERS: Mapping[str, tuple[str, str]] = {  # a prefix that only one kind of file has → what the file is, what to do
    "double_stream_modulation_img.": ("a FLUX.2 checkpoint", TAKEN),
    "distilled_guidance_layer.": ("a Chroma checkpoint", TAKEN),
    "double_stream_blocks.": ("a HiDream checkpoint", TAKEN),
    "double_blocks.": ("a Flux checkpoint", TAKEN),
    "joint_blocks.": ("an SD3 checkpoint", TAKEN),
    "txt_norm.": ("a Qwen-Image checkpoint", TAKEN),
    "context_refiner.": ("a Z-Image or Lumina checkpoint", TAKEN),
    "double_layers.": ("an AuraFlow checkpoint", TAKEN),
    "control_model.": ("a ControlNet", "Give it to `generate --controlnet`, and a checkpoint as the base."),
    "input_hint_block.": ("a ControlNet", "Give it to `generate --controlnet`, and a checkpoint as the base."),
    "motion_modules.": ("a motion module", TAKEN),
    "edm_mean": ("a Playground 2.5 checkpoint, which has EDM's noise", TAKEN),
    "emb_params": ("a textual inversion", "Give a whole checkpoint."),
}
REFINER_TEXT = "conditioner.embedders.0.model."
FLAT = "a tensor has not the number of dimensions that it should have"
DAMAGED = "It is damaged, or differs from the stock models: get it again, or give a diffusers folder of it."


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's header shows. `side`: the side of the square pictures that it was trained on, in pixels."""

    path: Path
    kind: Kind
    prediction: Prediction
    zero_snr: bool
    side: int
    shapes: Mapping[str, Shape]

    @property
    def has_vae(self) -> bool:
        return VAE + "decoder.conv_in.weight" in self.shapes


def sniff(path: Path) -> Checkpoint:
    """Read a checkpoint's header. Raises UsageError for files that are not complete text-to-image models of SDXL, SD1.5
    or SD2.1."""
    header = read_header(path)
    shapes = header.shapes
    kind = _kind(path, shapes)
    if len(shapes[FIRST]) != 4 or not shapes[UNET + "out.2.weight"]:
        raise UsageError(FLAT, path, DAMAGED)
    given, drawn = shapes[FIRST][1], shapes[UNET + "out.2.weight"][0]
    if given != drawn:
        what = "an inpainting" if given == 2 * drawn + 1 else "an image-conditioned"
        fix = "Give the text-to-image model that it was made from."
        raise UsageError(f"this is {what} checkpoint: its UNet takes {given} channels", path, fix)
    if UNET + "label_emb.0.0.weight" in shapes and kind != "sdxl":
        raise UsageError("this is an unCLIP checkpoint", path, TAKEN)
    if any(not any(prefix + place in shapes for place in POSITIONS) for prefix in TEXT[kind]):
        fix = "Get the full checkpoint, or a diffusers folder of the model."
        raise UsageError("the checkpoint has not all of its text encoders", path, fix)
    prediction = _prediction(header, kind)
    return Checkpoint(path, kind, prediction, "ztsnr" in shapes, _side(header, kind, prediction), shapes)


def _kind(path: Path, shapes: Mapping[str, Shape]) -> Kind:
    context = next((shape[-1] for key, shape in shapes.items() if shape and key.endswith("attn2.to_k.weight")), 0)
    if any(LORA.search(key) for key in shapes):
        raise UsageError("this is a LoRA, not a base model", path, "Give it as --lora, and a checkpoint as the base.")
    for mark, (what, fix) in OTHERS.items():
        if any(key.startswith(mark) or f".{mark}" in key for key in shapes):
            raise UsageError(f"this is {what}", path, fix)
    if FIRST not in shapes or UNET + "out.2.weight" not in shapes or not context:
        raise UsageError(f"this is {_part(shapes)}", path, "Give a whole checkpoint.")
    if any(key.startswith(REFINER_TEXT) for key in shapes) or context == 1280:
        fix = "Give the base model: the refiner only finishes pictures, and LoRAs are not trained on it."
        raise UsageError("this is an SDXL refiner", path, fix)
    if UNET + "label_emb.0.0.weight" in shapes and context not in (768, 1024):
        return "sdxl"
    if any(key.startswith(TEXT["sd21"]) for key in shapes) or context == 1024:
        return "sd21"
    return "sd15"


def _part(shapes: Mapping[str, Shape]) -> str:
    """What a file without a complete UNet in LDM names seems to be."""
    if any(key.startswith(("down_blocks.", "text_model.", "encoder.down_blocks.")) for key in shapes):
        return "one part of a diffusers model: the folder with model_index.json is the model"
    if any(key.startswith(("encoder.", VAE)) for key in shapes):
        return "a VAE, which goes with --vae"
    return f"no checkpoint that is known: its first tensor is {next(iter(sorted(shapes)), 'missing')}"


def _prediction(header: Header, kind: Kind) -> Prediction:
    """The prediction type: from the marker keys of SDXL models with v-prediction or zero terminal SNR, else from
    ModelSpec, else the usual one for the kind (SD2.1 at 768 px predicts v)."""
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    architecture = header.metadata.get("modelspec.architecture", "").lower()
    if "v_pred" in header.shapes or "ztsnr" in header.shapes or stated in ("v", "v_prediction"):
        return "v_prediction"
    if stated == "epsilon" or kind != "sd21" or architecture.startswith("stable-diffusion-v2-512"):
        return "epsilon"
    return "v_prediction"


def _side(header: Header, kind: Kind, prediction: Prediction) -> int:
    """The side in pixels: from ModelSpec's resolution (`1024x1024`; for other shapes, the square of equal area), else the
    usual one for the kind."""
    usual = {"sdxl": 1024, "sd15": 512, "sd21": 768 if prediction == "v_prediction" else 512}
    return stated_side(header) or usual[kind]


def stated_side(header: Header) -> int:
    """The side in pixels from ModelSpec's resolution; 0 if it is not stated."""
    found = re.fullmatch(r"(\d{2,4})x(\d{2,4})", header.metadata.get("modelspec.resolution", ""))
    return max(64, round((int(found[1]) * int(found[2])) ** 0.5 / 64) * 64) if found else 0
