"""Prints the estimated training memory on a CUDA card, by preset, for bases of the real sizes: `python -m
tools.memory_table`. No weights are loaded."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from unbraid.bases.presets import PRESETS
from unbraid.runs.api import learn_job, pair_job, split_job
from unbraid.runs.job import Job
from unbraid.runs.memory import GIB, estimate

UNETS: Mapping[str, dict[str, Any]] = {  # as in the models' own configurations
    "SDXL, 1024 px": {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "SD1.5, 512 px": {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
}


def jobs(picture: Path) -> dict[str, Callable[..., Job]]:
    """Verb → a function that makes its job."""
    words = {"subject": "fox", "style": "ink"}
    return {
        "split": lambda **options: split_job(picture, **words, **options),
        "pair": lambda **options: pair_job(picture, picture, **words, **options),
        "learn": lambda **options: learn_job(picture, prompt="a sks fox", **options),
    }


def rows(folder: Path) -> list[str]:
    """The lines of the table: GiB in total and, in brackets, of activations. `folder`: for temporary files."""
    picture = folder / "picture.png"
    Image.new("RGB", (64, 64)).save(picture)
    out = [f"| | {' | '.join(f'`--vram {name}`' for name in PRESETS)} |", "|---" * (len(PRESETS) + 1) + "|"]
    for base, config in UNETS.items():
        where = folder / base / "unet"
        where.mkdir(parents=True)
        (where / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **config}))
        for verb, make in jobs(picture).items():
            for rank in (64, 16):
                found = [estimate(make(base=str(where.parent), rank=rank, vram=name), "cuda") for name in PRESETS]
                cells = [f"{one.total / GIB:.1f} ({one.activations / GIB:.1f})" for one in found]
                out.append(f"| {base}: {verb}, rank {rank} | {' | '.join(cells)} |")
    return out


def main() -> None:
    with TemporaryDirectory() as folder:
        print("\n".join(rows(Path(folder))))


if __name__ == "__main__":
    main()
