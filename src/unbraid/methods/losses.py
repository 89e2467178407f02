"""The x0 loss (ConsisLoRA, arXiv 2503.10614) as a setting of every method that learns from pictures.

The usual loss compares the predicted noise or velocity with the true one. The x0 loss compares the clean latent x̂_0 that
the prediction implies with the clean latent of the picture: ‖x_0 − x̂_0‖². It is the usual loss times a factor that depends
on the timestep alone (`unbraid.bases.families.noising.Diffusion.x0_factor`), and gives more weight to steps with much noise,
where the layout and the large shapes of a picture are decided.
"""

from collections.abc import Callable
from dataclasses import replace

from unbraid.core.lora import Branch, Loss
from unbraid.core.recipe import Recipe
from unbraid.methods.added import adding, setting

ABOUT = """loss: what is compared with the truth: the base's `prediction`, or the clean picture that it implies (`x0`).
    x0_from: with `x0`, the step from which on that loss is used; before it, the loss is that of the prediction."""


def in_x0(recipe: Recipe, first: int) -> Recipe:
    """The same recipe with the x0 loss in all branches, from step `first` on."""
    branches: Callable[[int], tuple[Branch, ...]] = recipe.branches
    return replace(
        recipe,
        branches=lambda step: (
            branches(step) if step < first else tuple(replace(branch, loss="x0") for branch in branches(step))
        ),
    )


with_x0_loss = adding(
    (setting("loss", "prediction", Loss), setting("x0_from", 0, int)),
    ABOUT,
    lambda recipe, given: recipe if given["loss"] == "prediction" else in_x0(recipe, given["x0_from"]),
)
