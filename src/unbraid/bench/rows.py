"""A row of the benchmark: a function from a cell to hands, which draw each use (`content`, `style`, `both`); and the rows that hold
all others from above and below.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from unbraid.bench.shop import Hand, Shop
from unbraid.bench.truth.art import to_image
from unbraid.bench.truth.tasks import TASKS, Cell, Item, Task
from unbraid.runs.settings import Settings

Hands = Mapping[str, Hand]


@dataclass(frozen=True)
class Row:
    """A contender in a task. `settings` are its own to use; `ablation`: only run when it is asked for by name."""

    task: Task
    name: str
    make: Callable[[Shop, Cell, Settings], Hands]
    settings: Settings = field(default_factory=dict)
    ablation: bool = False
    methods: tuple[str, ...] = ()  # that it trains, whose versions its results depend on
    version: int = 1  # its own: raised when the same settings give other drawings


BASE, CEILING, COPY = "base alone", "true counterpart", "copy of the input"


def every_use(hand: Hand) -> Hands:
    return dict.fromkeys(("content", "style", "both"), hand)


def base_alone(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """No LoRA: what the base makes of the prompt."""
    del cell, settings
    return every_use(shop.hand())


def true_counterpart(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """The ceiling: the true picture, as the base's autoencoder gives it back. No base draws better than that."""
    del cell, settings

    def draw(item: Item, seeds: Sequence[int]) -> list[Image.Image]:
        vae, values = shop.base.vae, item.truth.values[None] * 2 - 1
        with torch.no_grad():
            latent = vae.encode(values.to(shop.base.device)).latent_dist.mode()  # type: ignore[union-attr]
            coded = vae.decode(latent).sample[0] / 2 + 0.5  # type: ignore[union-attr]
        return [to_image(coded.clamp(0, 1).cpu())] * len(seeds)

    return every_use(draw)


def copy_of_the_input(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """A cheat: shows the picture that it was given, whatever is asked for. The leak score is there to catch it."""
    del shop, settings
    given = {"content": cell.content, "style": cell.style, "both": cell.content}
    return {use: lambda item, seeds, truth=truth: [truth.image] * len(seeds) for use, truth in given.items()}


SANITY = [
    Row(task, name, make)
    for task in TASKS
    for name, make in ((BASE, base_alone), (CEILING, true_counterpart), (COPY, copy_of_the_input))
]
