"""The UNet of Stable Diffusion 1, 2 and XL."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from unbraid.bases.families.family import Prompt
from unbraid.bases.families.long_prompts import encode
from unbraid.common.errors import UsageError


class UNet:
    """The `Network` record of the UNet; its methods are documented there."""

    title: str = "UNet"
    part: str = "unet"
    residuals: tuple[str, ...] = ("down_block_additional_residuals", "mid_block_additional_residual")
    control_keys: tuple[str, ...] = ("in_channels", "cross_attention_dim", "block_out_channels")
    units: tuple[type[nn.Module], ...] = (ResnetBlock2D, BasicTransformerBlock)

    def size(self, config: Mapping[str, Any]) -> int:
        return config["sample_size"]

    def factor(self, config: Mapping[str, Any]) -> int:
        return 2 ** (len(config["block_out_channels"]) - 1)

    def check(self, pipe: Any, name: str) -> None:
        config = pipe.unet.config
        if config["in_channels"] != config["out_channels"]:
            what = f"its UNet takes {config['in_channels']} channels: an inpainting or image-conditioned model"
            raise UsageError(what, name, "Give the text-to-image model that it was made from.")

    def folder_config(self, folder: str) -> dict[str, Any]:
        found: Any = UNet2DConditionModel.load_config(folder, subfolder=self.part)
        return found

    def empty(self, config: Mapping[str, Any]) -> Any:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(config))

    def example(self, config: Mapping[str, Any], rows: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, device="meta", dtype=dtype)

        added = None
        if config["addition_embed_type"]:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            sizes = (("text_embeds", pooled), ("time_ids", 6))
            added = {name: torch.empty(rows, n, device="meta") for name, n in sizes}
        return {
            "sample": empty(rows, config["in_channels"], *[config["sample_size"]] * 2),
            "timestep": torch.empty(rows, device="meta"),
            "encoder_hidden_states": empty(rows, tokens, config["cross_attention_dim"]),
            "added_cond_kwargs": added,
        }

    def picture_sizes(self, arguments: Mapping[str, Any]) -> Tensor | None:
        return (arguments.get("added_cond_kwargs") or {}).get("time_ids")


def encode_text(pipe: Any, text: str, device: torch.device) -> Prompt:
    """Encode a text as the pipeline does, longer texts in chunks (`unbraid.bases.families.long_prompts`)."""
    return Prompt(*encode(pipe, text, device))
