"""The UNet of Stable Diffusion 1, 2 and XL."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from unbraid.bases.families.family import Prompt
from unbraid.bases.families.long_prompts import encode, remarks
from unbraid.bases.families.noising import Diffusion, Process, check_uniform
from unbraid.common.errors import UsageError
from unbraid.core.layers import UNET, Layers

TOKENS = 77


class UNet:
    """The `Network` record of the UNet; its methods are documented there."""

    title: str = "UNet"
    part: str = "unet"
    texts: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    layers: Layers = UNET
    residuals: tuple[str, ...] = ("down_block_additional_residuals", "mid_block_additional_residual")
    control_keys: tuple[str, ...] = ("in_channels", "cross_attention_dim", "block_out_channels")
    units: tuple[type[nn.Module], ...] = (ResnetBlock2D, BasicTransformerBlock)
    blocks: tuple[type[nn.Module], ...] = (BasicTransformerBlock,)
    patch: int = 1
    ragged: bool = False

    def side(self, pipe: Any) -> int:
        return pipe.unet.config["sample_size"] * pipe.vae_scale_factor

    def channels(self, config: Mapping[str, Any]) -> int:
        return config["in_channels"]

    def factor(self, config: Mapping[str, Any]) -> int:
        return 2 ** (len(config["block_out_channels"]) - 1)

    def check(self, pipe: Any, name: str) -> None:
        config = pipe.unet.config
        if config["in_channels"] != config["out_channels"]:
            what = f"its UNet takes {config['in_channels']} channels: an inpainting or image-conditioned model"
            raise UsageError(what, name, "Give the text-to-image model that it was made from.")

    def check_options(self, prediction: str, timesteps: str) -> None:
        check_uniform(timesteps)

    def process(self, config: Any, base: str, timesteps: str) -> Process:
        return Diffusion(config, base, timesteps)

    def folder_config(self, folder: str) -> dict[str, Any]:
        found: Any = UNet2DConditionModel.load_config(folder, subfolder=self.part)
        return found

    def empty(self, config: Mapping[str, Any]) -> Any:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(config))

    def example(self, config: Mapping[str, Any], rows: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, device="meta", dtype=dtype)

        added = None
        if config["addition_embed_type"]:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            sizes = (("text_embeds", pooled), ("time_ids", 6))
            added = {name: torch.empty(rows, n, device="meta") for name, n in sizes}
        conditions = {
            "encoder_hidden_states": empty(rows, TOKENS, config["cross_attention_dim"]),
            "added_cond_kwargs": added,
        }
        return empty(rows, config["in_channels"], *[config["sample_size"]] * 2), conditions

    def predict(
        self, denoiser: Any, noisy: Tensor, t: Tensor, guidance: float, conditions: Mapping[str, Any]
    ) -> Tensor:
        del guidance
        return denoiser(noisy, t, **conditions).sample

    def picture_sizes(self, arguments: Mapping[str, Any]) -> Tensor | None:
        return (arguments.get("added_cond_kwargs") or {}).get("time_ids")

    def schedule(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        del size
        scheduler.set_timesteps(steps)

    def prompt_arguments(self, prompt: Prompt, count: int) -> dict[str, Any]:
        given: dict[str, Any] = {"prompt_embeds": prompt.embeds.expand(count, -1, -1), "guidance_scale": 1.0}
        if prompt.pooled is not None:
            given["pooled_prompt_embeds"] = prompt.pooled.expand(count, -1)
        return given

    def stock_arguments(self, pipe: Any, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance}

    def received(self, args: Sequence[Any], given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        named = {**dict(zip(("sample", "timestep"), args, strict=False)), **given}
        return named["sample"], named["timestep"]

    def returned(self, prediction: Tensor) -> tuple[Any]:
        return (prediction,)

    def packed(self, latents: Tensor) -> Tensor:
        return latents

    def stand_in(self, denoiser: Any, masked: bool) -> dict[str, Any]:
        """With a mask, the configuration has 4 input channels, so that pipelines do not add the mask to them."""
        config = FrozenDict({**denoiser.config, "in_channels": 4}) if masked else denoiser.config
        return {"config": config, "add_embedding": getattr(denoiser, "add_embedding", None)}

    def remarks(self, pipe: Any, texts: Sequence[str]) -> list[str]:
        return remarks(pipe, texts)


def encode_text(pipe: Any, text: str, device: torch.device) -> Prompt:
    """Encode a text as the pipeline does, longer texts in chunks (`unbraid.bases.families.long_prompts`)."""
    return Prompt(*encode(pipe, text, device))
