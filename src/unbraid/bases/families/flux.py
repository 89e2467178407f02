"""Flux.1: dev, which takes a guidance scale as an input, and schnell, which does not."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from unbraid.bases.families.family import Family, Preset, Prompt
from unbraid.bases.families.segments import reading
from unbraid.bases.families.transformer import PATCH, SIDE, THREE_PASSES, Transformer, pooled, stacked
from unbraid.core.layers import ATTENTION, TRANSFORMERS, Layers

BLOCKS = (FluxTransformerBlock, FluxSingleTransformerBlock)
DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # of T5, as in the authors' code
_JOINT = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED = r"ff(_context)?\.net\.(0\.proj|2)"


class Flux(Transformer):
    """Latents go in as tokens: each 2×2 patch is one, `[b, h/2 · w/2, 4 c]`."""

    model: type[Any] = FluxTransformer2DModel
    texts: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    layers: Layers = Layers(
        {
            ATTENTION: rf"^(transformer_blocks\.\d+\.{_JOINT}|single_transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v))$",
            TRANSFORMERS: rf"^(transformer_blocks\.\d+\.({_JOINT}|{_FEED})"
            r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out))$",
        },
        text=r"^(transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\.net)|single_transformer_blocks\.\d+)\b",
    )
    units: tuple[type[nn.Module], ...] = BLOCKS
    blocks: tuple[type[nn.Module], ...] = BLOCKS

    def channels(self, config: Mapping[str, Any]) -> int:
        return config["in_channels"] // PATCH**2

    def example(self, config: Mapping[str, Any], rows: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
        with torch.device("meta"):
            conditions = {
                "encoder_hidden_states": torch.empty(
                    rows, text_tokens(config), config["joint_attention_dim"], dtype=dtype
                ),
                "pooled_projections": torch.empty(rows, config["pooled_projection_dim"], dtype=dtype),
            }
            return torch.empty(rows, self.channels(config), SIDE, SIDE, dtype=dtype), conditions

    def predict(
        self, denoiser: Any, noisy: Tensor, t: Tensor, guidance: float, conditions: Mapping[str, Any]
    ) -> Tensor:
        rows, _, height, width = noisy.shape
        texts = stacked(conditions["encoder_hidden_states"])
        scale = torch.full((rows,), guidance, device=noisy.device) if denoiser.config["guidance_embeds"] else None
        packed = pack(noisy)
        segments = conditions.get("segments", 1)
        apart = {} if segments == 1 else {"attention_mask": reading(segments, texts.shape[1], packed.shape[1], packed)}
        out = denoiser(
            hidden_states=packed,
            timestep=t / 1000,
            guidance=scale,
            pooled_projections=conditions["pooled_projections"],
            encoder_hidden_states=texts,
            txt_ids=torch.zeros(texts.shape[1], 3, device=noisy.device),
            img_ids=places(height // PATCH, width // PATCH, noisy.device),
            joint_attention_kwargs=apart or None,
            return_dict=False,
        )[0]
        return unpack(out, height // PATCH, width // PATCH)

    def stock_arguments(self, pipe: Any, guidance: float) -> dict[str, Any]:
        given = {"guidance_scale": 1.0, "true_cfg_scale": guidance, "negative_prompt": ""}
        return {**given, "max_sequence_length": text_tokens(pipe.transformer.config)}

    def received(self, args: Sequence[Any], given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        height, width = (int(given["img_ids"][-1, i]) + 1 for i in (1, 2))
        return unpack(given["hidden_states"], height, width), given["timestep"][:1] * 1000

    def returned(self, prediction: Tensor) -> tuple[Any]:
        return (pack(prediction),)

    def packed(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def longest(self, pipe: Any) -> tuple[Any, int]:
        return pipe.tokenizer_2, text_tokens(pipe.transformer.config)


def text_tokens(config: Mapping[str, Any]) -> int:
    """How many tokens of T5 the transformer reads."""
    return DEV_TOKENS if config["guidance_embeds"] else SCHNELL_TOKENS


def pack(latents: Tensor) -> Tensor:
    """`[b, c, h, w]` as tokens, `[b, h/2 · w/2, 4 c]`."""
    return F.pixel_unshuffle(latents, PATCH).flatten(2).mT


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`. `height`, `width`: in tokens."""
    return F.pixel_shuffle(packed.mT.unflatten(2, (height, width)), PATCH)


def places(height: int, width: int, device: torch.device) -> Tensor:
    """Row and column of each token, `[height · width, 3]`; the first number is 0."""
    row, column = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).float()


def encode_text(pipe: Any, text: str, device: torch.device) -> Prompt:
    """T5's embeddings of a text, padded or cut to the length that the transformer reads, and CLIP's pooled vector."""
    most = text_tokens(pipe.transformer.config)
    embeds, vector, _ = pipe.encode_prompt(text, None, device, max_sequence_length=most)
    return Prompt(embeds[0], vector[0])


def lora_metadata(pipe: Any) -> dict[str, str]:
    """A LoRA of schnell has the module names of dev, so its metadata has to say that it is one."""
    return {} if pipe.transformer.config["guidance_embeds"] else {"modelspec.architecture": "flux-1-schnell/lora"}


# The schedule of Pair Customization's own version for Flux: timesteps of the schedule for 4096 tokens, e^1.15 = 3.1582.
PAIR = Preset(
    {"rank": 32, "steps": 1500, "style_from": 750, "lr": 1e-5, "weight_decay": 0.01}, timesteps="uniform+shift=3.1582"
)
FAMILY = Family(
    "flux",
    FluxPipeline,
    lambda config: config.get("_class_name") == "FluxTransformer2DModel",
    Flux(),
    {},  # which blocks control content or style is not known well enough
    encode_text,
    pooled,
    lora_metadata,
    {"unziplora": THREE_PASSES, "qr-split": THREE_PASSES, "pair": PAIR},
)
