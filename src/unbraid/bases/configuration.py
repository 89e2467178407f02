"""The family and the configuration of a base, found without loading weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbraid.bases.families import FAMILIES, family_of_config
from unbraid.bases.families.family import Family
from unbraid.bases.pipeline import location
from unbraid.bases.recognised import check_supported, pipeline_class
from unbraid.bases.single_file import configs
from unbraid.bases.sniff import sniff
from unbraid.bases.transformer_config import transformer_config
from unbraid.bases.transformer_file import transformer_file
from unbraid.common.errors import UsageError, first_line


def denoiser_config(base: str) -> tuple[Family, Mapping[str, Any]]:
    """The family of a base and the configuration of its denoiser. `base`: a folder, a hub id (the configuration is
    downloaded), or a checkpoint (it is derived from the header). Raises UsageError if there is none."""
    check_supported(pipeline_class(base), base)
    config = _of_file(Path(base)) if Path(base).is_file() else _of_folder(base)
    return family_of_config(config), config


def _of_file(file: Path) -> Mapping[str, Any]:
    if transformer := transformer_file(file):
        return transformer_config(transformer)
    found = configs(sniff(file))
    return next(found[key] for family in FAMILIES if (key := f"{family.network.part}/config.json") in found)


def _of_folder(base: str) -> Mapping[str, Any]:
    path, failed = location(base), ""
    for network in {family.network.part: family.network for family in FAMILIES}.values():
        try:
            return network.folder_config(path)
        except (OSError, ValueError) as error:
            failed = failed or first_line(error)
    fix = "Give icons, a complete diffusers folder, a checkpoint, or a hub id (a first download needs a network)."
    raise UsageError(f"the base cannot be loaded: {failed}", base, fix)
