"""Opening single-file checkpoints of SDXL, SD1.5 and SD2.1 (LDM names, as on Civitai) and VAE files with diffusers,
offline."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from unbraid.bases.checkpoint_config import (
    Config,
    VaeKind,
    expected_names,
    model_index,
    scheduler_config,
    text_configs,
    unet_config,
    vae_config,
)
from unbraid.bases.clip_tokenizer import END, SIZE, clip_tokenizer
from unbraid.bases.families.unet import UNet
from unbraid.bases.sniff import DAMAGED, FLAT, VAE, Checkpoint, Kind, sniff
from unbraid.common.errors import UsageError, first_line
from unbraid.files.formats.header import Shape, read_header

PIPELINES: Mapping[Kind, type[DiffusionPipeline]] = {
    "sdxl": StableDiffusionXLPipeline,
    "sd15": StableDiffusionPipeline,
    "sd21": StableDiffusionPipeline,
}
PADS: Mapping[Kind, tuple[str, ...]] = {"sdxl": (END, "!"), "sd15": (END,), "sd21": ("!",)}  # padding tokens
UNFIT = (OSError, ValueError, LookupError, RuntimeError, SafetensorError, SingleFileComponentError)


def configs(checkpoint: Checkpoint) -> dict[str, Config]:
    """Name of a JSON file in a diffusers folder → its contents. Raises UsageError if tensors are missing or the UNet's
    shapes do not fit together."""
    try:
        scheduler = scheduler_config(checkpoint.kind, checkpoint.prediction, checkpoint.zero_snr)
        found = {
            "model_index.json": model_index(checkpoint.kind, scheduler),
            "scheduler/scheduler_config.json": scheduler,
            "unet/config.json": unet_config(checkpoint),
        }
        texts = dict(
            zip(("text_encoder/config.json", "text_encoder_2/config.json"), text_configs(checkpoint), strict=False)
        )
        if checkpoint.has_vae:
            found["vae/config.json"] = vae_config(checkpoint.shapes, checkpoint.kind)
    except KeyError as error:
        raise UsageError(
            f"the checkpoint lacks {error.args[0]}", checkpoint.path, "Get the full checkpoint."
        ) from error
    except (IndexError, ValueError) as error:
        raise UsageError(FLAT, checkpoint.path, DAMAGED) from error
    _check_unet(checkpoint, found["unet/config.json"])
    for config in texts.values():
        if config["vocab_size"] < SIZE:
            what = f"its text encoder knows {config['vocab_size']} tokens, CLIP has {SIZE}"
            raise UsageError(what, checkpoint.path, "Give a diffusers folder of the model, with its tokenizer.")
    return found | texts


def _check_unet(checkpoint: Checkpoint, config: Config) -> None:
    """Raise UsageError unless the file has every weight of the UNet in the shape that follows from the configuration."""
    try:
        parameters = dict(UNet().empty(config).named_parameters())
    except ValueError as error:
        raise UsageError(
            f"not a UNet that can be built ({error})", checkpoint.path, "Give a diffusers folder of it."
        ) from error
    for name, parameter in parameters.items():
        key = expected_names(name, checkpoint.kind)
        if checkpoint.shapes.get(key) != tuple(parameter.shape):
            there = (
                f"is {checkpoint.shapes[key]}, not {tuple(parameter.shape)}"
                if key in checkpoint.shapes
                else "is not there"
            )
            raise UsageError(f"{key} {there}", checkpoint.path, DAMAGED)


def load_single_file(path: Path, dtype: torch.dtype, vae: AutoencoderKL | None) -> Any:
    """The pipeline of a checkpoint: its UNet and text encoders in `dtype`; its VAE in full precision, or `vae` if one is
    given. Raises UsageError if the checkpoint cannot be loaded or lacks weights."""
    checkpoint = sniff(path)
    if vae is None and not checkpoint.has_vae:
        fix = "Add --vae FOLDER or FILE (for SDXL, an fp16-safe one)."
        raise UsageError("the checkpoint has no VAE", path, fix)
    tokenizers = {f"tokenizer{'_2' * i}": clip_tokenizer(pad) for i, pad in enumerate(PADS[checkpoint.kind])}
    with TemporaryDirectory() as name:
        folder = write_configs(Path(name), configs(checkpoint))
        try:
            given = vae or vae_in(path, folder)
            load: Any = PIPELINES[checkpoint.kind].from_single_file  # type: ignore[attr-defined]
            pipe = load(str(path), config=name, local_files_only=True, torch_dtype=dtype, vae=given, **tokenizers)
        except UNFIT as error:
            raise UsageError(f"cannot be loaded: {reason(error)}", path, "Get the full checkpoint.") from error
    check_whole(pipe, path)
    return pipe


def load_vae_file(path: Path, kind: VaeKind) -> AutoencoderKL:
    """A VAE from its own file or from a checkpoint. `kind` gives the scaling factor. Raises UsageError if it cannot be
    loaded."""
    shapes = read_header(path).shapes
    prefix = VAE if f"{VAE}decoder.conv_in.weight" in shapes else ""
    if f"{prefix}encoder.down.0.block.0.conv2.weight" not in shapes:
        fix = "Give a VAE with LDM names, or a diffusers folder or hub id of one."
        raise UsageError("there is no VAE in this file whose names are known", path, fix)
    with TemporaryDirectory() as name:
        config = _vae_config(shapes, kind, prefix, path)
        try:
            vae = vae_in(path, write_configs(Path(name), {"vae/config.json": config}))
        except UNFIT as error:
            raise UsageError(f"cannot be loaded: {reason(error)}", path, "Get another copy of it.") from error
    check_whole({"vae": vae}, path)
    return vae


def _vae_config(shapes: Mapping[str, Shape], kind: VaeKind, prefix: str, path: Path) -> Config:
    try:
        return vae_config(shapes, kind, prefix)
    except KeyError as error:
        raise UsageError(f"the VAE lacks {error.args[0]}", path, "Get another copy of it.") from error


def vae_in(source: Path | Mapping[str, Tensor], folder: Path) -> AutoencoderKL:
    """The VAE of a file, or of tensors with LDM names. `folder` has its configuration in `vae`."""
    load: Any = AutoencoderKL.from_single_file
    given = str(source) if isinstance(source, Path) else dict(source)
    return load(given, config=str(folder), subfolder="vae", local_files_only=True, torch_dtype=torch.float32)


def write_configs(folder: Path, found: Mapping[str, Config]) -> Path:
    """Write configurations, by the names of their files. Returns the folder."""
    for name, config in found.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    return folder


def check_whole(pipe: Any, path: Path) -> None:
    """Raise UsageError if some weights have no values, because the file lacks them."""
    parts = pipe if isinstance(pipe, dict) else pipe.components
    for part, model in parts.items():
        empty = [name for name, p in model.named_parameters() if p.is_meta] if isinstance(model, nn.Module) else []
        if empty:
            raise UsageError(
                f"it lacks {len(empty)} weights of its {part}, such as {empty[0]}", path, "Get the full file."
            )


def reason(error: BaseException) -> str:
    """Why loading failed, in one line. torch raises NotImplementedError for a weight that has no values, diffusers explains at length
    what else could be done about a shape, and transformers refers to a table that is not shown."""
    line = first_line(error, 1000)
    if isinstance(error, NotImplementedError):
        return "weights are missing"
    if found := re.search(
        r"(\S+) expected shape (?:torch\.Size)?\(?(.+?)\)?, but got (?:torch\.Size)?\(?(.+?)\)?\. If", line
    ):
        return f"{found[1]} is {found[3]}, not {found[2]}"
    if "ignore_mismatched_sizes" in line:
        return "its weights have other shapes than its config.json says"
    return first_line(error).rstrip(".")
