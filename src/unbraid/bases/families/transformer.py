"""What the diffusion transformers have in common: the parts of a `Network` that are equal for Flux, SD3.5 and Z-Image."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.bases.families.family import Preset, Prompt
from unbraid.bases.families.flow import Flow, dynamic_shift, parsed
from unbraid.bases.families.noising import Process
from unbraid.common.errors import UsageError
from unbraid.core.layers import Layers

SIDE = 128  # side of the usual latents, for pictures of 1024 px
# Attention reads text and picture together, so an adapter cannot read a prompt of its own. In place of that, each adapter
# has a loss under its own prompt beside the loss of both: three passes with three prompts.
THREE_PASSES = Preset({"content_alone": 1.0, "style_alone": 1.0})
PATCH = 2  # side of the patches of which each is a token


class Transformer:
    """A `Network`, whose methods are documented there. Its subclasses, one per family, have the rest."""

    title: str = "transformer"
    part: str = "transformer"
    model: type[Any]  # the class in diffusers
    texts: tuple[str, ...]
    layers: Layers
    residuals: tuple[str, ...] = ()
    control_keys: tuple[str, ...] = ()
    units: tuple[type[nn.Module], ...]
    blocks: tuple[type[nn.Module], ...]
    patch: int = PATCH
    ragged: bool = False
    density: str = "uniform"  # how timesteps are drawn in training, as published
    preconditioned: bool = False  # whether the published loss is that of x_0

    def side(self, pipe: Any) -> int:
        return pipe.vae.config["sample_size"]

    def channels(self, config: Mapping[str, Any]) -> int:
        return config["in_channels"]

    def factor(self, config: Mapping[str, Any]) -> int:
        return PATCH

    def check(self, pipe: Any, name: str) -> None:
        config = pipe.transformer.config
        if config.get("out_channels") not in (None, config["in_channels"]):
            what = f"its transformer takes {config['in_channels']} channels: an inpainting or image-conditioned model"
            raise UsageError(what, name, "Give the text-to-image model that it was made from.")

    def check_options(self, prediction: str, timesteps: str) -> None:
        if prediction:
            raise UsageError("a base with flow matching predicts the velocity", "--prediction", "Leave it out.")
        parsed(timesteps or self.density)

    def process(self, config: Any, base: str, timesteps: str) -> Process:
        return Flow(config, base, timesteps or self.density, self.preconditioned)

    def folder_config(self, folder: str) -> dict[str, Any]:
        return self.model.load_config(folder, subfolder=self.part)

    def empty(self, config: Mapping[str, Any]) -> Any:
        with torch.device("meta"):
            return self.model.from_config(dict(config))

    def picture_sizes(self, arguments: Mapping[str, Any]) -> Tensor | None:
        return None

    def schedule(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=dynamic_shift(scheduler.config, tokens(size)))

    def prompt_arguments(self, prompt: Prompt, count: int) -> dict[str, Any]:
        given: dict[str, Any] = {"prompt_embeds": prompt.embeds.expand(count, -1, -1), "guidance_scale": 1.0}
        assert prompt.pooled is not None
        return {**given, "pooled_prompt_embeds": prompt.pooled.expand(count, -1)}

    def stock_arguments(self, pipe: Any, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance}

    def received(self, args: Sequence[Any], given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return given["hidden_states"], given["timestep"]

    def returned(self, prediction: Tensor) -> tuple[Any]:
        return (prediction,)

    def packed(self, latents: Tensor) -> Tensor:
        return latents

    def stand_in(self, denoiser: Any, masked: bool) -> dict[str, Any]:
        return {"config": denoiser.config, "cache_context": lambda name: nullcontext()}

    def longest(self, pipe: Any) -> tuple[Any, int]:
        """The tokenizer that takes the longest texts, and how many tokens it takes."""
        raise NotImplementedError

    def remarks(self, pipe: Any, texts: Sequence[str]) -> list[str]:
        tokenizer, most = self.longest(pipe)
        counts = {text: len(tokenizer(text).input_ids) for text in dict.fromkeys(texts)}
        return [
            f"a long prompt, {count} tokens, of which the first {most} are read: {text[:40]}…"
            for text, count in counts.items()
            if count > most
        ]


def tokens(size: tuple[int, int]) -> int:
    """The number of tokens of a latent of this height and width."""
    return (size[0] // PATCH) * (size[1] // PATCH)


def stacked(texts: Tensor | Sequence[Tensor]) -> Tensor:
    """The embeddings of a batch, `[b, tokens, channels]`."""
    return texts if isinstance(texts, Tensor) else torch.stack(list(texts))


def pooled(prompts: Sequence[Prompt], sizes: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The pooled vectors of the texts, `[b, channels]`, as an argument of the denoiser."""
    del sizes
    return {"pooled_projections": torch.stack([one.pooled for one in prompts if one.pooled is not None]).to(dtype)}
