"""Which base model a LoRA file was made for."""

from pathlib import Path

from unbraid.files.formats.header import catalogue, read_header

BASE = "unbraid.base"  # the metadata key in which unbraid records the name of the base
TITLES = {"sdxl": "SDXL", "sd15": "SD1.5", "sd21": "SD2.1", "flux": "Flux", "sd3": "SD3", "unknown": "another base"}


def recorded_base(path: Path) -> str:
    """The name of the base as the file's metadata records it: `icons`, a hub id, or the last part of a path. Empty if there is none."""
    return read_header(path).metadata.get(BASE, "")


def made_for(path: Path) -> str:
    """The base that a file was made for: its recorded name, else its family, such as SDXL."""
    header = read_header(path)
    family = catalogue(header).verdict.family
    return header.metadata.get(BASE, "") or TITLES.get(family, family)
