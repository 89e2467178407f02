"""Prints the estimated training memory on a CUDA card, by preset and by `--swap`, for bases of the real sizes: `python -m
tools.memory_table`. No weights are loaded."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from unbraid.bases.families import FAMILIES
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

# The transformers as in the models' own configurations, where they differ from the defaults of diffusers' classes
TRANSFORMERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Flux.1-dev, 1024 px": ("flux", {"guidance_embeds": True}),
    "SD3.5 medium, 1024 px": (
        "sd3",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": list(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "SD3.5 large, 1024 px": (
        "sd3",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "Z-Image, 1024 px": ("z-image", {}),
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
        where = written(folder / base, "unet", "UNet2DConditionModel", config)
        for verb, make in jobs(picture).items():
            out += [line(base, verb, make, where, rank) for rank in (64, 16)]
    for base, (name, config) in TRANSFORMERS.items():
        family = next(one for one in FAMILIES if one.name == name)
        network: Any = family.network
        where = written(folder / base, network.part, network.model.__name__, config)
        (where / "model_index.json").write_text(json.dumps({"_class_name": family.pipeline.__name__}))
        out += [line(base, verb, jobs(picture)[verb], where, 16) for verb in ("split", "learn")]
    return out


SWAPS = {"Flux.1-dev, 1024 px": (28, 42, 57), "SD3.5 large, 1024 px": (19, 28, 38), "Z-Image, 1024 px": (17, 25, 34)}


def swap_rows(folder: Path) -> list[str]:
    """The lines of the table of `--swap`: GiB in total of learning with rank 16, after `rows`, whose folder it reads."""
    picture, titles = folder / "picture.png", ("none", "half", "three quarters", "all")
    out = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for base, counts in SWAPS.items():
        for vram in ("12", "8"):
            given: dict[str, Any] = {"base": str(folder / base), "rank": 16, "vram": vram}
            jobs = [learn_job(picture, prompt="a sks fox", **given, swap=n) for n in (0, *counts)]
            cells = [f"{estimate(one, 'cuda').total / GIB:.1f} ({one.loading.swap})" for one in jobs]
            out.append(f"| {base}, `--vram {vram}` | {' | '.join(cells)} |")
    return out


def written(folder: Path, part: str, kind: str, config: Mapping[str, Any]) -> Path:
    """A base that has only the configuration of its denoiser."""
    (folder / part).mkdir(parents=True)
    (folder / part / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
    return folder


def line(base: str, verb: str, make: Callable[..., Job], where: Path, rank: int) -> str:
    """A row of the table."""
    found = [estimate(make(base=str(where), rank=rank, vram=name), "cuda") for name in PRESETS]
    cells = [f"{one.total / GIB:.1f} ({one.activations / GIB:.1f})" for one in found]
    return f"| {base}: {verb}, rank {rank} | {' | '.join(cells)} |"


def flops(name: str, config: Mapping[str, Any]) -> float:
    """Floating-point operations of a forward pass of a transformer with one picture, on the meta device."""
    network: Any = next(one.network for one in FAMILIES if one.name == name)
    denoiser = network.empty(config)
    noisy, conditions = network.example(denoiser.config, 1, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.predict(denoiser, noisy, torch.empty(1, device="meta"), 1.0, conditions)
    return counter.get_total_flops()


def main() -> None:
    """Prints the table, and the operations of a forward pass of each transformer."""
    with TemporaryDirectory() as folder:
        print("\n".join(rows(Path(folder))))
        print("\n".join(swap_rows(Path(folder))))
    for base, (name, config) in TRANSFORMERS.items():
        print(f"{base}: {flops(name, config) / 1e12:.1f} TFLOP a forward pass")


if __name__ == "__main__":
    main()
