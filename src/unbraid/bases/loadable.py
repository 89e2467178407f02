"""Whether a base can be opened as asked, as far as that can be told without its weights: from names, headers and configurations."""

from pathlib import Path

from unbraid.bases.configuration import denoiser_config
from unbraid.bases.pipeline import check_given_parts, check_prediction, check_vae
from unbraid.bases.presets import Loading
from unbraid.bases.savings import swapped_blocks
from unbraid.bases.transformer_file import transformer_file
from unbraid.common.errors import UsageError


def check_loading(base: str, loading: Loading) -> None:
    """Raise UsageError for a damaged base, and for options that it cannot be opened with. A base on the hub whose configuration
    cannot be read now is left for the time when it is opened."""
    _ = loading.preset
    check_prediction(loading.prediction)
    if loading.vae:
        check_vae(loading.vae)
    if loading.parts:
        check_given_parts(transformer_file(Path(base)) if Path(base).is_file() else None, loading.parts)
    try:
        family, config = denoiser_config(base)
    except UsageError:
        if base != "icons" and not Path(base).exists():
            return
        raise
    family.network.check_options(loading.prediction, loading.timesteps)
    if loading.swap:
        swapped_blocks(family.network.empty(config), family.network, loading.swap)
