"""How a picture was drawn, as text for its file: in our own form, and in the one that A1111, Forge and Civitai read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unbraid.sampling.render import Sampling, Use


def picture_texts(
    base: str, prompt: str, seed: int, sampling: Sampling, loras: Sequence[Use] = (), styles: Sequence[Use] = ()
) -> dict[str, str]:
    """Key → text for a PNG file. Of LoRA files only the names are recorded, not the folders, and so of a local base."""

    base = Path(base).name if Path(base).exists() else base

    def used(uses: Sequence[Use]) -> list[dict[str, Any]]:
        found = [
            {"file": use.file.name, "strength": use.scale, "prompt": use.prompt, "without": use.without or None}
            for use in uses
        ]
        return [{key: value for key, value in one.items() if value is not None} for one in found]

    record = {"prompt": prompt, "negative": sampling.negative, "seed": seed, "steps": sampling.steps}
    record |= {"guidance": sampling.guidance, "sampler": sampling.sampler, "base": base}
    record |= {"loras": used(loras), "styles": used(styles)}
    tags = "".join(f" <lora:{use.file.stem}:{use.scale:g}>" for use in loras)
    lines = [f"{prompt}{tags}", *([f"Negative prompt: {sampling.negative}"] if sampling.negative else [])]
    lines.append(f"Steps: {sampling.steps}, CFG scale: {sampling.guidance:g}, Seed: {seed}, Model: {base}")
    given = {key: value for key, value in record.items() if value not in ("", [])}
    return {"parameters": "\n".join(lines), "unbraid": json.dumps(given)}
