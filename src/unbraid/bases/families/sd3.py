"""Stable Diffusion 3 and 3.5: medium, whose first blocks have a second attention, and large."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor, nn

from unbraid.bases.families.family import Family, Prompt
from unbraid.bases.families.flow import dynamic_shift
from unbraid.bases.families.segments import read_masks, reading
from unbraid.bases.families.transformer import THREE_PASSES, Transformer, pooled, stacked, tokens
from unbraid.core.layers import ATTENTION, SELF_ATTENTION, TRANSFORMERS, Layers

BLOCKS = (JointTransformerBlock,)
CLIP_TOKENS, T5_TOKENS = 77, 256  # as the pipeline reads them
_JOINT = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_SELF = r"attn2\.(to_q|to_k|to_v|to_out\.0)"  # of the picture alone, in the blocks with a second attention
_FEED = r"ff(_context)?\.net\.(0\.proj|2)"


class SD3(Transformer):
    """Latents go in as they are. `attn2` is attention of the picture to itself, not cross-attention as in the UNet."""

    model: type[Any] = SD3Transformer2DModel
    texts: tuple[str, ...] = ("text_encoder", "text_encoder_2")  # T5, the third, may be missing
    layers: Layers = Layers(
        {
            ATTENTION: rf"^transformer_blocks\.\d+\.({_JOINT}|{_SELF})$",
            SELF_ATTENTION: rf"^transformer_blocks\.\d+\.{_SELF}$",
            TRANSFORMERS: rf"^transformer_blocks\.\d+\.({_JOINT}|{_SELF}|{_FEED})$",
        },
        text=r"^transformer_blocks\.\d+\.(attn\.(add_[qkv]_proj|to_add_out)|ff_context\.net)\b",
    )
    units: tuple[type[nn.Module], ...] = BLOCKS
    blocks: tuple[type[nn.Module], ...] = BLOCKS
    density: str = "logit-normal"
    preconditioned: bool = True

    def side(self, pipe: Any) -> int:
        return pipe.transformer.config["sample_size"] * pipe.vae_scale_factor

    def factor(self, config: Mapping[str, Any]) -> int:
        return config["patch_size"]

    def example(self, config: Mapping[str, Any], rows: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
        count = CLIP_TOKENS + T5_TOKENS
        with torch.device("meta"):
            conditions = {
                "encoder_hidden_states": torch.empty(rows, count, config["joint_attention_dim"], dtype=dtype),
                "pooled_projections": torch.empty(rows, config["pooled_projection_dim"], dtype=dtype),
            }
            return torch.empty(rows, config["in_channels"], *[config["sample_size"]] * 2, dtype=dtype), conditions

    def predict(
        self, denoiser: Any, noisy: Tensor, t: Tensor, guidance: float, conditions: Mapping[str, Any]
    ) -> Tensor:
        del guidance
        texts, segments = stacked(conditions["encoder_hidden_states"]), conditions.get("segments", 1)
        apart = {}
        if segments > 1:
            read_masks(denoiser)
            picture = noisy.shape[-2] * noisy.shape[-1] // denoiser.config["patch_size"] ** 2
            apart = {"attention_mask": reading(segments, texts.shape[1], picture, texts, picture_first=True)}
        return denoiser(
            hidden_states=noisy,
            timestep=t,
            encoder_hidden_states=texts,
            pooled_projections=conditions["pooled_projections"],
            joint_attention_kwargs=apart or None,
            return_dict=False,
        )[0]

    def schedule(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        dynamic = scheduler.config.get("use_dynamic_shifting")
        scheduler.set_timesteps(steps, mu=dynamic_shift(scheduler.config, tokens(size)) if dynamic else None)

    def received(self, args: Any, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return given["hidden_states"], given["timestep"][:1]

    def stock_arguments(self, pipe: Any, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance, "max_sequence_length": t5_tokens(pipe)}

    def longest(self, pipe: Any) -> tuple[Any, int]:
        if pipe.tokenizer_3 is None:
            return pipe.tokenizer, pipe.tokenizer_max_length
        return pipe.tokenizer_3, T5_TOKENS


def t5_tokens(pipe: Any) -> int:
    """How many tokens follow those of the CLIPs. Without T5 they are zeros, as in the pipeline. There are none on a base whose
    tokenizers take less than CLIP's 77: it was trained without T5 (tools/recipe/dit.py)."""
    return 0 if pipe.tokenizer_3 is None and pipe.tokenizer_max_length < CLIP_TOKENS else T5_TOKENS


def encode_text(pipe: Any, text: str, device: torch.device) -> Prompt:
    """The embeddings of both CLIPs side by side, followed by T5's (zeros without T5), and both pooled vectors."""
    given = {"device": device, "do_classifier_free_guidance": False, "max_sequence_length": t5_tokens(pipe)}
    embeds, _, vector, _ = pipe.encode_prompt(text, None, None, **given)
    return Prompt(embeds[0], vector[0])


def lora_metadata(pipe: Any) -> dict[str, str]:
    """Which of the models a LoRA is for: 3.5 normalises queries and keys, and large has more blocks than medium."""
    config = pipe.transformer.config
    if not config["qk_norm"]:
        return {}
    size = "medium" if config["dual_attention_layers"] else "large"
    return {"modelspec.architecture": f"stable-diffusion-3.5-{size}/lora"}


FAMILY = Family(
    "sd3",
    StableDiffusion3Pipeline,
    lambda config: config.get("_class_name") == "SD3Transformer2DModel",
    SD3(),
    {},  # which blocks control content or style is not known well enough
    encode_text,
    pooled,
    lora_metadata,
    {"unziplora": THREE_PASSES, "qr-split": THREE_PASSES},
)
