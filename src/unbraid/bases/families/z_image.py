"""Z-Image: text and picture in one stream."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel, ZImageTransformerBlock
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from torch import Tensor, nn

from unbraid.bases.families.family import Family, Prompt
from unbraid.bases.families.transformer import SIDE, THREE_PASSES, Transformer
from unbraid.core.layers import ATTENTION, TRANSFORMERS, Layers

BLOCKS = (ZImageTransformerBlock,)
TOKENS = 512  # of a text at most, with the words that the chat template adds
USUAL = 64  # tokens of a text in the memory estimate
_BLOCK = r"^(layers|noise_refiner|context_refiner)\.\d+\."
_ATTENTION = r"attention\.(to_q|to_k|to_v|to_out\.0)"


class ZImage(Transformer):
    """It takes lists: a latent `[c, 1, h, w]` and a text `[tokens, channels]` per row. Its time runs from 0 (noise) to 1, and
    its prediction is x_0 − ε, the negative of what its scheduler takes."""

    model: type[Any] = ZImageTransformer2DModel
    texts: tuple[str, ...] = ("text_encoder",)
    layers: Layers = Layers(
        {
            ATTENTION: rf"{_BLOCK}{_ATTENTION}$",
            TRANSFORMERS: rf"{_BLOCK}({_ATTENTION}|feed_forward\.w[123])$",
        }
    )
    units: tuple[type[nn.Module], ...] = BLOCKS
    blocks: tuple[type[nn.Module], ...] = BLOCKS
    ragged: bool = True

    def example(self, config: Mapping[str, Any], rows: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
        with torch.device("meta"):
            texts = torch.empty(rows, USUAL, config["cap_feat_dim"], dtype=dtype)
            latents = torch.empty(rows, config["in_channels"], SIDE, SIDE, dtype=dtype)
        return latents, {"encoder_hidden_states": texts}

    def predict(
        self, denoiser: Any, noisy: Tensor, t: Tensor, guidance: float, conditions: Mapping[str, Any]
    ) -> Tensor:
        del guidance
        latents = list(noisy[:, :, None].unbind(0))
        texts = list(conditions["encoder_hidden_states"])
        out = denoiser(latents, (1000 - t) / 1000, texts, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    def prompt_arguments(self, prompt: Prompt, count: int) -> dict[str, Any]:
        return {"prompt_embeds": [prompt.embeds] * count, "guidance_scale": 0.0}

    def stock_arguments(self, pipe: Any, guidance: float) -> dict[str, Any]:
        """Its pipelines count from the prompt's own prediction: e_c + g (e_c − e_u)."""
        return {"guidance_scale": guidance - 1}

    def received(self, args: Sequence[Any], given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        latents, time = args[:2]
        return torch.stack(latents).squeeze(2), 1000 - time[:1] * 1000

    def returned(self, prediction: Tensor) -> tuple[Any]:
        return (list((-prediction)[:, :, None].unbind(0)),)

    def stand_in(self, denoiser: Any, masked: bool) -> dict[str, Any]:
        return {"config": denoiser.config, "in_channels": denoiser.in_channels}

    def longest(self, pipe: Any) -> tuple[Any, int]:
        return pipe.tokenizer, TOKENS


def encode_text(pipe: Any, text: str, device: torch.device) -> Prompt:
    """The last hidden state but one of the language model, without padding: texts have different lengths."""
    embeds, _ = pipe.encode_prompt(text, device, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    return Prompt(embeds[0], None)


FAMILY = Family(
    "z-image",
    ZImagePipeline,
    lambda config: config.get("_class_name") == "ZImageTransformer2DModel",
    ZImage(),
    {},  # which blocks control content or style is not known well enough
    encode_text,
    lambda prompts, sizes, dtype: {},
    lambda pipe: {},
    {"unziplora": THREE_PASSES, "qr-split": THREE_PASSES},
)
