"""Loading what a single file of a transformer has: the transformer, and in complete checkpoints the autoencoder and text
encoders. Nothing is downloaded."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from unbraid.bases.checkpoint_config import Config, text_config, vae_config
from unbraid.bases.clip_tokenizer import END, clip_tokenizer
from unbraid.bases.recognised import left_out, pipeline_class
from unbraid.bases.single_file import UNFIT, check_whole, reason, vae_in, write_configs
from unbraid.bases.transformer_config import family_of_file, transformer_config
from unbraid.bases.transformer_file import EXAMPLES, TITLES, TransformerFile
from unbraid.common.errors import UsageError
from unbraid.files.formats.header import opened

SHIFTS: Mapping[bool, Config] = {  # of Flux.1: dev, schnell
    True: {"shift": 3.0, "use_dynamic_shifting": True},
    False: {"shift": 1.0, "use_dynamic_shifting": False},
}
SD3_SHIFT = 3.0


def own_parts(file: TransformerFile, dtype: torch.dtype, vae: AutoencoderKL | None, parts: str) -> dict[str, Any]:
    """The components of a pipeline that a file has, by name: transformer and text encoders in `dtype`, the VAE in full
    precision, or `vae` if one is given; and Flux's schedule, which follows from the kind of transformer.

    `parts`: the diffusers folder or hub id that has the other components, and the configurations of the text encoders;
    empty if there is none. Raises UsageError if something cannot be loaded."""
    config = transformer_config(file)
    with TemporaryDirectory() as name:
        folder = write_configs(Path(name), {"transformer/config.json": config, **_own_configs(file)})
        try:
            found: dict[str, Any] = {"transformer": _transformer(file, folder, dtype)}
            if vae is not None or file.vae is not None:
                found["vae"] = vae or vae_in(_tensors(file, str(file.vae), drop=True), folder)
            missing = left_out(parts) if parts else ("tokenizer_3",)
            for part, prefix in file.encoders.items():
                if part.replace("text_encoder", "tokenizer") not in missing:
                    found[part] = _encoder(file, part, prefix, parts or str(folder), dtype)
        except UNFIT as error:
            raise UsageError(f"cannot be loaded: {reason(error)}", file.path, "Get the full file.") from error
    check_whole(found, file.path)
    if file.kind == "flux":
        found["scheduler"] = FlowMatchEulerDiscreteScheduler(**SHIFTS[config["guidance_embeds"]])
    return found


def complete(file: TransformerFile, own: Mapping[str, Any]) -> Any:
    """The pipeline of a file that lacks nothing. Raises UsageError for all others."""
    check_complete(file, "vae" in own)
    tokenizers = {"tokenizer": clip_tokenizer(END), "tokenizer_2": clip_tokenizer("!")}
    third = {"text_encoder_3": None, "tokenizer_3": None}
    schedule = FlowMatchEulerDiscreteScheduler(shift=SD3_SHIFT)
    return family_of_file(file).pipeline(scheduler=schedule, **tokenizers, **third, **own)


def check_complete(file: TransformerFile, vae: bool) -> None:
    """Raise UsageError unless a file lacks nothing: SD3.5 with both CLIPs and a VAE, but without T5, whose tokenizer would be missing.
    `vae`: whether there is one, in the file or beside it."""
    clips = {"text_encoder", "text_encoder_2"} <= file.encoders.keys()
    if file.kind == "sd3" and clips and vae and "text_encoder_3" not in file.encoders:
        return
    lacking = "text encoders" if file.kind == "z-image" or len(file.encoders) < 2 else "tokenizers"
    what = f"this file of {TITLES[file.kind]} has no {lacking}{'' if vae else ' and no VAE'}"
    raise UsageError(what, file.path, f"Add --parts {EXAMPLES[file.kind]}, or set UNBRAID_PARTS.")


def check_parts(file: TransformerFile, parts: str) -> None:
    """Raise UsageError unless the folder or hub id `parts` is a pipeline of the file's family."""
    name = pipeline_class(parts)
    if name != family_of_file(file).pipeline.__name__:
        what = f"is a {name}, not {TITLES[file.kind]}" if name else f"has no model_index.json of {TITLES[file.kind]}"
        raise UsageError(
            what, f"--parts {parts}", f"Give a diffusers folder or a hub id such as {EXAMPLES[file.kind]}."
        )


def _own_configs(file: TransformerFile) -> dict[str, Config]:
    """Configurations of the autoencoder, and of SD3's CLIPs."""
    shapes, found = file.header.shapes, dict[str, Config]()
    try:
        if file.vae is not None:
            found["vae/config.json"] = vae_config(shapes, file.kind, file.vae) | {"sample_size": file.side}
        for part, prefix in file.encoders.items():
            if part != "text_encoder_3" and file.kind == "sd3":
                config = text_config(shapes, f"{prefix}text_model.", "sd15")
                act = "gelu" if part == "text_encoder_2" else "quick_gelu"
                found[f"{part}/config.json"] = config | {"hidden_act": act}
    except KeyError as error:
        raise UsageError(f"it lacks {error.args[0]}", file.path, "Get the full file.") from error
    return found


def _transformer(file: TransformerFile, folder: Path, dtype: torch.dtype) -> Any:
    state = dict[str, Tensor]()
    with opened(file.path, "pt") as handle:
        for name, part in file.weights.items():
            # slices are read from the file alone; a single number has none
            key = file.prefix + part.key
            whole = handle.get_slice(key)[part.rows] if file.header.shapes[key] else handle.get_tensor(key)
            state[name] = part.of(whole).to(dtype)
    load: Any = family_of_file(file).network.model.from_single_file  # type: ignore[attr-defined]
    return load(state, config=str(folder), subfolder="transformer", local_files_only=True, torch_dtype=dtype)


def _encoder(file: TransformerFile, part: str, prefix: str, config: str, dtype: torch.dtype) -> Any:
    """One text encoder. `config`: the folder or hub id with its configuration, in the subfolder `part`."""
    state, given = _tensors(file, prefix), {"subfolder": part, "config": config, "torch_dtype": dtype}
    if "t5xxl" in prefix:
        return create_diffusers_t5_model_from_checkpoint(T5EncoderModel, state, **given)
    kind = CLIPTextModelWithProjection if file.kind == "sd3" else CLIPTextModel
    return create_diffusers_clip_model_from_ldm(kind, state, **given)


def _tensors(file: TransformerFile, prefix: str, drop: bool = False) -> dict[str, Tensor]:
    """The tensors whose keys begin with `prefix`. `drop`: without it."""
    with opened(file.path, "pt") as handle:
        keys = [key for key in file.header.shapes if key.startswith(prefix)]
        return {key.removeprefix(prefix if drop else ""): handle.get_tensor(key) for key in keys}
