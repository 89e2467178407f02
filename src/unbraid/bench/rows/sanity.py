"""Rows that are no methods: a lower bound, an upper bound, and a cheat. They show whether the scores can be trusted."""

from collections.abc import Sequence

import torch
from PIL import Image

from unbraid.bench.rows.row import BASE, CEILING, COPY, Drawers, Row, every_use
from unbraid.bench.rows.training_cache import TrainingCache
from unbraid.bench.truth.art import to_image
from unbraid.bench.truth.tasks import TASKS, Cell, Item
from unbraid.runs.settings import Settings


def base_alone(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """The base without any LoRA, given the same prompt."""
    del cell, settings
    return every_use(cache.drawer())


def true_counterpart(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """The ceiling: the true picture, encoded and decoded by the base's autoencoder. The base cannot draw anything closer to it."""
    del cell, settings

    def draw(item: Item, seeds: Sequence[int]) -> list[Image.Image]:
        vae, values = cache.base.vae, item.truth.values[None] * 2 - 1
        with torch.no_grad():
            latent = vae.encode(values.to(cache.base.device)).latent_dist.mode()  # type: ignore[union-attr]
            decoded = vae.decode(latent).sample[0] / 2 + 0.5  # type: ignore[union-attr]
        return [to_image(decoded.clamp(0, 1).cpu())] * len(seeds)

    return every_use(draw)


def copy_of_the_input(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """A cheat: it returns the input picture whatever the prompt is. The leak score must expose it."""
    del cache, settings
    inputs = {"content": cell.content, "style": cell.style, "both": cell.content}
    return {use: lambda item, seeds, truth=truth: [truth.image] * len(seeds) for use, truth in inputs.items()}


ROWS = [
    Row(task, name, make)
    for task in TASKS
    for name, make in ((BASE, base_alone), (CEILING, true_counterpart), (COPY, copy_of_the_input))
]
