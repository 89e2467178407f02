"""Whether a base can be opened as asked, as far as that can be told without its weights: from names, headers and configurations."""

from pathlib import Path

from unbraid.bases.configuration import denoiser_config
from unbraid.bases.folder_files import check_folder
from unbraid.bases.pipeline import check_given_parts, check_prediction, check_vae, location
from unbraid.bases.presets import Loading
from unbraid.bases.recognised import components, default_parts
from unbraid.bases.savings import swapped_blocks
from unbraid.bases.transformer_file import transformer_file
from unbraid.bases.transformer_loading import check_complete
from unbraid.common.errors import UsageError


def check_loading(base: str, loading: Loading) -> None:
    """Raise UsageError for a damaged base, and for options that it cannot be opened with. A base on the hub whose configuration
    cannot be read now is left for the time when it is opened."""
    _ = loading.preset
    check_prediction(loading.prediction)
    if loading.vae:
        check_vae(loading.vae)
    file = transformer_file(Path(base)) if Path(base).is_file() else None
    if parts := loading.parts or default_parts(file.kind if file else ""):
        check_given_parts(file, parts)
    elif file:
        check_complete(file, bool(loading.vae or file.vae))
    try:
        family, config = denoiser_config(base)
    except UsageError:
        if base != "icons" and not Path(base).exists():
            return
        raise
    if Path(location(base)).is_dir():
        check_folder(Path(location(base)), components(base))
    family.network.check_options(loading.prediction, loading.timesteps)
    if loading.swap:
        swapped_blocks(family.network.empty(config), family.network, loading.swap)
