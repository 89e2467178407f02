"""The families of base models, one file each. Training, drawing and the memory estimate read a base's `Family` record
and never check which family it is.

To add a family, write a file with its `Family` and add it to FAMILIES below. family.py describes the fields.
"""

from collections.abc import Mapping
from typing import Any

from unbraid.bases.families import flux, sd3, sd15, sdxl, z_image
from unbraid.bases.families.family import Family

FAMILIES = (flux.FAMILY, sd3.FAMILY, z_image.FAMILY, sdxl.FAMILY, sd15.FAMILY)
BLOCKS = {family.name: family.blocks for family in FAMILIES}


def family_of(pipe: Any) -> Family:
    """The family of a loaded pipeline."""
    return next(family for family in FAMILIES if isinstance(pipe, family.pipeline))


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a denoiser's configuration, where no weights have been loaded."""
    return next(family for family in FAMILIES if family.matches(config))
