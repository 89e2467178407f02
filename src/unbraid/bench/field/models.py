"""The models that papers measure with: CLIP, DINO, CSD, LPIPS. They are loaded from folders or hub ids that the user names; the package
contains none.

Only safetensors files are read. A model with missing weights is refused, because transformers would fill them with random numbers.
Pictures are prepared with the model's own settings, by Pillow, and models run in full precision.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModelWithProjection,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from unbraid.bases.devices import pick_device
from unbraid.bases.pipeline import known_model
from unbraid.bench.field import csd as csd_files
from unbraid.common.errors import UsageError, first_line
from unbraid.common.interrupts import interrupts_kept

DINOS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # one class token, then registers, then patches
LPIPS_NETS = {"features.28.weight": "vgg", "features.3.squeeze.weight": "squeeze", "features.0.weight": "alex"}
WEIGHTS = "model.safetensors"
NOT_CSD = "style (CLIP type)"
BAD = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    SafetensorError,
)  # what the libraries raise if a folder is not a usable model


@dataclass(frozen=True)
class Encoder:
    """A model that maps pictures to vectors. `label` names its scores in tables; `name` is the folder or hub id that the user gave."""

    label: str
    name: str
    prepare: Callable[[Sequence[Image.Image]], Float[Tensor, "n 3 h w"]]
    vectors: Callable[[Tensor], Float[Tensor, "n d"]]
    device: torch.device
    patches: Callable[[Tensor], Float[Tensor, "n p d"]] | None = None  # one vector per patch, if the model has them


@dataclass(frozen=True)
class Clip:
    """A model that maps pictures and prompts to vectors of one space."""

    image: Encoder
    text: Callable[[Sequence[str]], Float[Tensor, "n d"]]


@dataclass(frozen=True)
class Lpips:
    """LPIPS (arXiv 1801.03924). `distance`: two batches of pictures `[n, 3, h, w]` in -1..1 → distances `[n]`."""

    label: str
    name: str
    distance: Callable[[Tensor, Tensor], Float[Tensor, " n"]]
    device: torch.device


@dataclass(frozen=True)
class FieldModels:
    """The models to measure with. Without a model, tables lack its columns."""

    clip: Clip | None = None
    dino: Encoder | None = None
    csd: Encoder | None = None
    lpips: Lpips | None = None

    def names(self) -> dict[str, str]:
        """Label → name of the model. Scores from different models are not comparable."""
        some = (self.clip and self.clip.image, self.dino, self.csd, self.lpips)
        return {one.label: one.name for one in some if one}


def load_models(
    clip: str | None = None,
    dino: str | None = None,
    csd: str | None = None,
    lpips: str | None = None,
    device: str | None = None,
) -> FieldModels:
    """Load the models that are given, each as a folder or a hub id; `csd` and `lpips` may also be a .safetensors file.

    Raises UsageError for a folder that holds another kind of model, no safetensors file, or not all weights."""
    where = torch.device(device or pick_device())
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return FieldModels(
        clip=load_clip(clip, where) if clip else None,
        dino=load_dino(dino, where) if dino else None,
        csd=load_csd(csd, where) if csd else None,
        lpips=load_lpips(lpips, where) if lpips else None,
    )


def load_clip(name: str, device: torch.device) -> Clip:
    """A CLIPModel with its image processor and tokenizer, such as openai/clip-vit-base-patch32."""
    model = _whole(CLIPModel, name, "CLIP model", device)
    tokenizer = _part(AutoTokenizer, name, "CLIP model")
    longest = model.config.text_config.max_position_embeddings

    def text(prompts: Sequence[str]) -> Tensor:
        inputs = tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return model.get_text_features(**inputs.to(device)).pooler_output

    def vectors(pixels: Tensor) -> Tensor:
        return model.get_image_features(pixel_values=pixels).pooler_output

    return Clip(Encoder("CLIP-I", name, _processor(name, "CLIP model"), vectors, device), text)


def load_dino(name: str, device: torch.device) -> Encoder:
    """DINO (facebook/dino-vits16), DINOv2 or DINOv3: the class token of the last layer."""
    kind = "DINO model"
    config = _part(AutoConfig, name, kind)
    if config.model_type not in DINOS:
        raise UsageError(f"a model of type {config.model_type}", name, f"Give a {kind}: {', '.join(DINOS)}.")
    model = _whole(AutoModel, name, kind, device)
    first = 1 + config.to_dict().get("num_register_tokens", 0)

    def vectors(pixels: Tensor) -> Tensor:
        return model(pixel_values=pixels).last_hidden_state[:, 0]

    def patches(pixels: Tensor) -> Tensor:
        return model(pixel_values=pixels).last_hidden_state[:, first:]

    return Encoder("DINO", name, _processor(name, kind), vectors, device, patches)


def load_csd(name: str, device: torch.device) -> Encoder:
    """A style model: a checkpoint of CSD (arXiv 2404.01292) with its style head, or any CLIP vision model with a projection. The scores of
    the latter are labelled differently."""
    kind = "style model"
    file = _weights(name, kind)
    tensors = _read(file, kind)
    if csd_files.is_csd(tensors):
        model, prepare = csd_files.build(tensors, file, device)
        label = "CSD"
    elif _part(AutoConfig, name, kind).model_type == "clip":
        return replace(load_clip(name, device).image, label=NOT_CSD)
    else:
        model, prepare = _whole(CLIPVisionModelWithProjection, name, kind, device), _processor(name, kind)
        label = NOT_CSD
    return Encoder(label, name, prepare, lambda pixels: model(pixel_values=pixels).image_embeds, device)


def load_lpips(name: str, device: torch.device) -> Lpips:
    """LPIPS on AlexNet, VGG16 or SqueezeNet with torchvision's key names, such as timm/vgg16.tv_in1k. The learned layers on top are part
    of torchmetrics."""
    kind = "LPIPS backbone"
    file = _weights(name, kind)
    tensors = _read(file, kind)
    fix = "Give AlexNet, VGG16 or SqueezeNet 1.1 with torchvision's key names."
    net = next((net for key, net in LPIPS_NETS.items() if key in tensors), None)
    if net is None:
        raise UsageError(f"not an {kind}", file, fix)
    try:
        from torchmetrics.functional.image.lpips import _LPIPS

        model: Any = _LPIPS(net=net, pnet_rand=True)  # type: ignore[arg-type]  # otherwise it would download a backbone
    except ModuleNotFoundError as error:
        raise UsageError("LPIPS needs torchmetrics and torchvision", "--lpips", "pip install unbraid[bench]") from error
    for slot, parameter in model.net.named_parameters():
        inside = slot.split(".", 2 if net == "squeeze" else 1)[-1]  # slices.1.3.squeeze.weight, slice2.5.weight
        tensor = tensors.get(f"features.{inside}")
        if tensor is None or tensor.shape != parameter.shape:
            raise UsageError(f"these are not the weights of {net}: see features.{inside}", file, fix)
        parameter.data = tensor.float()
    model.to(device)
    return Lpips(f"LPIPS ({net})", name, lambda a, b: model(a, b).flatten(), device)


def _whole(kind: Any, name: str, what: str, device: torch.device) -> Any:
    """A model in evaluation mode. UsageError if weights are missing."""
    known_model(name, what, "Give a folder or a hub id.")
    fix = "Give a complete folder with safetensors, or a hub id (a first download needs a network)."
    try:
        model, info = kind.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32
        )
    except BAD as error:
        raise UsageError(f"the {what} cannot be loaded: {first_line(error)}", name, fix) from error
    missing = sorted(
        key for key in info["missing_keys"] if "pooler" not in key
    )  # DINO's pooler is neither stored nor used
    if missing or info["mismatched_keys"]:
        what = f"no {what}: {len(missing)} weights are missing" + (f", such as {missing[0]}" if missing else "")
        raise UsageError(what, name, fix)
    return model.eval().requires_grad_(False).to(device)


def _part(kind: Any, name: str, what: str, **options: Any) -> Any:
    known_model(name, what, "Give a folder or a hub id.")
    try:
        return kind.from_pretrained(name, **options)
    except BAD as error:
        fix = "Give a complete folder, or a hub id (a first download needs a network)."
        raise UsageError(f"the {what} cannot be loaded: {first_line(error)}", name, fix) from error


def _processor(name: str, what: str) -> Callable[[Sequence[Image.Image]], Tensor]:
    """The model's own preprocessing, with Pillow's resampling as in the papers' code. torchvision's gives other values."""
    processor = _part(AutoImageProcessor, name, what, backend="pil")
    return lambda images: processor(list(images), return_tensors="pt")["pixel_values"]


def _weights(name: str, what: str) -> Path:
    """The safetensors file that a name stands for: the file itself, or the one in a folder or hub repository."""
    if Path(name).is_file():
        if not name.endswith(".safetensors"):
            raise UsageError(
                "only safetensors are read, because pickles can run code", name, "Convert it: see the docs."
            )
        return Path(name)
    known_model(name, what, "Give a .safetensors file, a folder with one, or a hub id.")
    try:
        found = cached_file(name, WEIGHTS)
    except OSError as error:
        fix = "Pickles are not read, because they can run code. Convert it, or check the name."
        raise UsageError(f"there is no {WEIGHTS} of a {what}", name, fix) from error
    return Path(str(found))


def _read(file: Path, what: str) -> dict[str, Tensor]:
    try:
        with interrupts_kept():
            return load_file(file)
    except SafetensorError as error:
        raise UsageError(f"the {what} is damaged ({error})", file, "Download it again.") from error
