"""What a single file of a transformer contains, from its header alone: the family, the weights, and which of text encoders
and autoencoder it has. No tensor is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unbraid.bases.original_names import Kind, Part, parts
from unbraid.bases.sniff import LORA, stated_side
from unbraid.common.errors import UsageError
from unbraid.files.formats.header import Header, Shape, read_header

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
MARKS: Mapping[Kind, tuple[str, ...]] = {  # a file is of a kind if it has all keys of one line
    "flux": ("double_blocks.0.img_attn.qkv.weight", "single_transformer_blocks.0.attn.to_q.weight"),
    "sd3": ("joint_blocks.0.x_block.attn.qkv.weight", "pos_embed.pos_embed"),
    "z-image": ("layers.0.adaLN_modulation.0.weight",),
}
STRANGERS = (  # what other models with the same names have beside them
    "double_stream_modulation_img.",  # FLUX.2
    "distilled_guidance_layer.",  # Chroma
    "control_",  # ControlNets
)
TITLES: Mapping[Kind, str] = {"flux": "Flux.1", "sd3": "SD3.5", "z-image": "Z-Image"}
EXAMPLES: Mapping[Kind, str] = {
    "flux": "black-forest-labs/FLUX.1-schnell",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "z-image": "Tongyi-MAI/Z-Image-Turbo",
}
_CLIP_L, _CLIP_G, _T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
ENCODERS: Mapping[Kind, Mapping[str, str]] = {  # part of the pipeline → prefix of its weights, in complete checkpoints
    "flux": {"text_encoder": _CLIP_L, "text_encoder_2": _T5},
    "sd3": {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5},
    "z-image": {},  # diffusers reads no language model from a file
}
VAES = ("first_stage_model.", "vae.")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class TransformerFile:
    """`weights`: diffusers' name of each weight of the transformer → where it is. `prefix`: of the transformer's keys."""

    header: Header
    kind: Kind
    prefix: str
    weights: Mapping[str, Part]

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def shapes(self) -> dict[str, Shape]:
        """diffusers' name of each weight of the transformer → its shape."""
        return {name: part.shape for name, part in self.weights.items()}

    @property
    def side(self) -> int:
        """The side of the square pictures that it was trained on, in pixels: from ModelSpec's resolution, else 1024."""
        return stated_side(self.header) or 1024

    @property
    def vae(self) -> str | None:
        """The prefix of the autoencoder's keys; None if there is none."""
        return next((one for one in VAES if f"{one}decoder.conv_in.weight" in self.header.shapes), None)

    @property
    def encoders(self) -> dict[str, str]:
        """The text encoders: part of the pipeline → prefix of its keys."""
        keys = self.header.shapes
        return {
            part: prefix for part, prefix in ENCODERS[self.kind].items() if any(key.startswith(prefix) for key in keys)
        }


def transformer_file(path: Path) -> TransformerFile | None:
    """What a file of Flux.1, SD3 or Z-Image contains; None if it is another file. Raises UsageError if it cannot be read, and
    for models that are no base: those that take more channels, and those with quantised weights."""
    header = read_header(path)
    found = next((prefix for prefix in PREFIXES if _kind(header, prefix)), None)
    if found is None:
        return None
    kind = _kind(header, found)
    assert kind
    others = (*VAES, "text_encoders.")
    own = {
        key.removeprefix(found): shape
        for key, shape in header.shapes.items()
        if key.startswith(found) and not key.startswith(others)
    }
    _check_numbers(header, kind)
    return TransformerFile(header, kind, found, parts(own, kind))


def _kind(header: Header, prefix: str) -> Kind | None:
    keys = header.shapes
    if any(key.startswith(f"{prefix}{one}") for key in keys for one in STRANGERS) or any(map(LORA.search, keys)):
        return None
    return next((kind for kind, marks in MARKS.items() if any(prefix + mark in keys for mark in marks)), None)


def _check_numbers(header: Header, kind: Kind) -> None:
    """Raise UsageError if weights are quantised with scales of their own."""
    scaled = next((key for key in header.shapes if key.endswith(("scale_weight", "scaled_fp8", "weight_scale"))), "")
    odd = next((key for key, dtype in header.dtypes.items() if dtype not in FLOATS), "")
    if scaled or odd:
        fix = "Give it in fp32, bf16, fp16 or plain 8-bit floats; `--vram 8` keeps weights in 8 bits."
        what = f"its weights are quantised, such as {scaled or odd}"
        raise UsageError(f"{TITLES[kind]}: {what}", header.path, fix)
