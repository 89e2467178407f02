"""Opening a base model as a diffusers pipeline: the embedded base, a folder, a hub id or a single file, if wanted with
another VAE."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from socket import gaierror
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import OfflineModeIsEnabled
from torch import nn
from transformers.utils import logging as transformers_logging

from unbraid.bases.checkpoint_config import VaeKind
from unbraid.bases.families import FAMILIES, family_of
from unbraid.bases.folder_files import check_filled, check_folder
from unbraid.bases.recognised import check_supported, components, default_parts, left_out, pipeline_class
from unbraid.bases.single_file import UNFIT, check_whole, load_single_file, load_vae_file, reason
from unbraid.bases.sniff import sniff
from unbraid.bases.transformer_file import TransformerFile, transformer_file
from unbraid.bases.transformer_loading import check_parts, complete, own_parts
from unbraid.common.errors import UsageError

# The pipeline classes of all families, for the type checker
Pipeline = (
    StableDiffusionXLPipeline | StableDiffusionPipeline | FluxPipeline | StableDiffusion3Pipeline | ZImagePipeline
)
EXAMPLE = "a hub id such as stabilityai/stable-diffusion-xl-base-1.0."
KINDS: Mapping[str, VaeKind] = {family.pipeline.__name__: family.name for family in FAMILIES}  # type: ignore[misc]
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


def open_pipeline(name: str, dtype: torch.dtype, vae: str = "", prediction: str = "", parts: str = "") -> Pipeline:
    """Open a base: UNet and text encoders in `dtype`, the VAE in full precision because some VAEs overflow in fp16.

    `vae`: a folder, hub id or file to use in place of the base's own VAE. `prediction`: `epsilon` or `v`, for a base whose
    files do not state it, or state it wrongly. `parts`: a folder or hub id with what a transformer's single file lacks.
    Raises UsageError for whatever is no text-to-image model of a known family."""
    check_prediction(prediction)
    path = location(name)
    with quiet():
        other = _open_vae(vae, path) if vae else None
        transformer = transformer_file(Path(path)) if Path(path).is_file() else None
        if parts:
            check_given_parts(transformer, parts)
        if transformer:
            pipe = _assembled(transformer, dtype, other, parts)
        elif Path(path).is_file():
            pipe = load_single_file(Path(path), dtype, other)
        else:
            pipe = _folder(name, path, dtype, {"vae": other} if other is not None else {})
    _check(pipe, name, vae)
    family_of(pipe).network.check_options(prediction, "")
    if prediction:
        pipe.scheduler.register_to_config(prediction_type=PREDICTIONS[prediction])
    pipe.set_progress_bar_config(disable=True)
    _accept_half_precision(pipe.vae)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def check_prediction(prediction: str) -> None:
    """Raise UsageError for a prediction type that there is not. Empty: as the base says."""
    if prediction and prediction not in PREDICTIONS:
        raise UsageError(f"there is no prediction type {prediction!r}", "--prediction", "Give epsilon or v.")


def check_given_parts(file: TransformerFile | None, parts: str) -> None:
    """Raise UsageError if `parts` does not complete a transformer's file. `file`: None for other bases."""
    if not file:
        raise UsageError("goes with a single file of Flux.1, SD3.5 or Z-Image", "--parts", "Leave it out.")
    known_model(parts, "folder", "Give a diffusers folder or a hub id.", f"--parts {parts}")
    check_parts(file, parts)


def check_vae(name: str) -> None:
    """Raise UsageError if there can be no VAE of this name."""
    fix = "Give a diffusers folder, a .safetensors file, or a hub id such as madebyollin/sdxl-vae-fp16-fix."
    known_model(name, "VAE", fix)


def location(name: str) -> str:
    """Where a base is: a folder, a file, or a hub id. Raises UsageError if the name is none of them."""
    path = str(files("unbraid.bases").joinpath("icons")) if name == "icons" else name
    known_model(path, "base model", f"Give icons, a diffusers folder, a .safetensors checkpoint, or {EXAMPLE}", name)
    return path


def known_model(path: str, what: str, fix: str, name: str = "") -> None:
    """Raise UsageError if `path` neither exists nor looks like a hub id. `what` and `fix` are for the message."""
    if not Path(path).exists() and (path.count("/") != 1 or path.startswith((".", "/", "~")) or _is_file_name(path)):
        raise UsageError(f"there is no such {what}", name or path, fix)


def _is_file_name(path: str) -> bool:
    return path.endswith((".safetensors", ".ckpt", ".pt"))


def _assembled(file: TransformerFile, dtype: torch.dtype, vae: AutoencoderKL | None, parts: str) -> Any:
    """The pipeline of a transformer's single file: what it has, and the rest from the folder or hub id `parts`."""
    if not parts and (parts := default_parts(file.kind)):
        check_given_parts(file, parts)
    own = own_parts(file, dtype, vae, parts)
    return _folder(parts, parts, dtype, own) if parts else complete(file, own)


def _folder(name: str, path: str, dtype: torch.dtype, own: Mapping[str, Any]) -> Any:
    """The pipeline of a folder or hub id, with the components `own` in place of its own."""
    check_supported(pipeline_class(path), name)
    given = {**dict.fromkeys(left_out(path)), **own}  # diffusers loads a base without them only if that is asked for
    found = check_folder(Path(path), components(path).keys() - given.keys()) if Path(path).is_dir() else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            path, torch_dtype={"default": dtype, "vae": torch.float32}, use_safetensors=True, **given
        )
    except UNFIT as error:
        if _offline(error):
            fix = "Connect for the first download, or give a folder or a file."
            raise UsageError("there is no network, and this model is not in the cache", name, fix) from error
        fix = "Give icons, a complete diffusers folder with .safetensors weights, or a hub id."
        raise UsageError(f"the base cannot be loaded: {reason(error)}", name, fix) from error
    check_whole(pipe, Path(name))
    check_filled(pipe, Path(path), found)
    return pipe


def _offline(error: BaseException | None) -> bool:
    """Whether an error was caused by a network that cannot be reached, or that may not be used."""
    while error:
        if isinstance(error, OfflineModeIsEnabled | ConnectionError | TimeoutError | gaierror):
            return True
        error = error.__cause__ or error.__context__
    return False


def _open_vae(name: str, base: str) -> AutoencoderKL:
    check_vae(name)
    if Path(name).is_file():
        return load_vae_file(Path(name), _kind(base))
    inside = {"subfolder": "vae"} if (Path(name) / "vae").is_dir() else {}
    if Path(name).is_dir():
        check_folder(Path(name), inside.values() or ("",))
    try:
        vae = AutoencoderKL.from_pretrained(name, torch_dtype=torch.float32, use_safetensors=True, **inside)
    except UNFIT as error:
        fix = "Give a complete diffusers folder with .safetensors weights, a file, or a hub id."
        raise UsageError(f"the VAE cannot be loaded: {reason(error)}", name, fix) from error
    check_whole({"vae": vae}, Path(name))
    return vae


def _kind(base: str) -> VaeKind:
    """The kind of the base. It gives the scaling factor of a VAE file, which has no configuration."""
    if Path(base).is_file():
        found = transformer_file(Path(base))
        return found.kind if found else sniff(Path(base)).kind
    name = pipeline_class(base)
    if not name:
        raise UsageError("the base cannot be loaded: it has no model_index.json", base, "Give a diffusers folder.")
    check_supported(name, base)
    return KINDS[name]


def _check(pipe: Any, name: str, vae: str) -> None:
    """Check what training and sampling rely on. Raises UsageError."""
    network = family_of(pipe).network
    network.check(pipe, name)
    if any(pipe.components[part] is None for part in network.texts if part in pipe.components):
        fix = "Give the base model: the refiner only finishes pictures, and LoRAs are not trained on it."
        raise UsageError("a text encoder is missing, as in SDXL's refiner", name, fix)
    channels, wanted = pipe.vae.config["latent_channels"], network.channels(getattr(pipe, network.part).config)
    if channels != wanted:
        what = f"the VAE has {channels} latent channels, the {type(getattr(pipe, network.part)).__name__} {wanted}"
        raise UsageError(what, vae or name, "Give a VAE of this kind of base.")


def _accept_half_precision(vae: Any) -> None:
    """Make a full-precision VAE accept the latents of a half-precision UNet."""

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].to(next(module.parameters()).dtype), *args[1:])

    for part in (vae.encoder, vae.post_quant_conv or vae.decoder):
        part.register_forward_pre_hook(cast)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the log messages, progress bars and warnings of the libraries."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
