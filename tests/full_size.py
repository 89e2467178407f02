"""Measures bake and extract on a synthetic SDXL checkpoint of full size (6.9 GB in fp16), and `cp` for comparison:
python tests/full_size.py FOLDER [fp32].

It needs three times the checkpoint's size on the disk, and deletes its files. It is no test, because it takes minutes.
"""

import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ldm import clip_state, open_clip_state, unet_state, vae_state
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from unbraid.core.lora import Lora
from unbraid.core.lowrank import svd
from unbraid.files.checkpoint_file import opened_checkpoint
from unbraid.files.formats.places import modules
from unbraid.files.lora_file import read, write

UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
ROUNDS = 1
BLOCK = 1 << 24  # random numbers, which are reused from different offsets
SPREAD = 0.03  # standard deviation of weights, about that of SDXL
RANK, CHANGE = 16, 0.02  # the rank of the LoRA; the size of its change relative to the weights


def shapes() -> dict[str, tuple[int, ...]]:
    """Key → shape of everything in SDXL's single file."""
    text: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        first = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **text
            )
        )
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
                **text,
            )
        )
        vae = AutoencoderKL(**VAE)
        state = unet_state(unet) | vae_state(vae, "first_stage_model.")
        state |= clip_state(first, "conditioner.embedders.0.transformer.text_model.")
        state |= open_clip_state(second, "conditioner.embedders.1.model.")
    return {key: tuple(value.shape) for key, value in state.items()}


def make_checkpoint(path: Path, dtype: str) -> None:
    """Write a checkpoint of normally distributed numbers, piece by piece."""
    width = {"F16": 2, "F32": 4}[dtype]
    noise = (np.random.default_rng(0).standard_normal(BLOCK, np.float32) * SPREAD).astype(f"<f{width}")
    header, end = {}, 0
    for key, shape in shapes().items():
        begin, end = end, end + width * int(np.prod(shape))
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left, start = end // width, 0
        while left:
            piece = noise[start : start + left]
            file.write(piece.tobytes())
            left, start = left - len(piece), (start + 7919 * 101) % (BLOCK // 2)


def make_lora(checkpoint: Path, path: Path) -> None:
    """A LoRA on every layer."""
    rng, loras = torch.Generator().manual_seed(1), {}
    with opened_checkpoint(checkpoint) as file:
        for name in modules(file.layout):
            d, *rest = file.module_weight(name).shape
            size = (SPREAD * CHANGE / RANK**0.5) ** 0.5
            down, up = (torch.randn(shape, generator=rng) * size for shape in ((RANK, *rest), (d, RANK)))
            loras[name] = Lora(down.half(), (up if len(rest) == 1 else up[:, :, None, None]).half(), float(RANK))
    write(path, loras, family="sdxl")


def timed(*command: object) -> tuple[float, float]:
    """Seconds and peak memory in GiB of a command, in its own process, so that no other peak is counted."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    start = perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], check=True, capture_output=True, text=True
    )
    print(result.stdout.strip().rpartition("\n")[0])
    return perf_counter() - start, int(result.stdout.split()[-1]) / 2**20


def off(first: Path, second: Path) -> tuple[float, float]:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over all layers, and of the worst layer, computed from factors."""
    one, other = read(first).modules, read(second).modules
    squares, worst = [0.0, 0.0], 0.0
    for name, lora in one.items():
        mine = other[name]
        both = Lora(
            torch.cat([lora.down.float().flatten(1), mine.down.float().flatten(1)]),
            torch.cat(
                [
                    lora.up.float().flatten(1) * (lora.alpha / len(lora.down)),
                    mine.up.float().flatten(1) * (-mine.alpha / len(mine.down)),
                ],
                1,
            ),
            float(len(lora.down) + len(mine.down)),
        )
        lost, square = float(svd(both)[1].square().sum()), float(svd(lora)[1].square().sum())
        squares, worst = [squares[0] + lost, squares[1] + square], max(worst, (lost / square) ** 0.5)
    return (squares[0] / squares[1]) ** 0.5, worst


def main(folder: Path, dtype: str) -> None:
    base, lora, copy, tuned, again = (
        folder / f"full-{name}.safetensors" for name in ("base", "lora", "copy", "tuned", "again")
    )
    unbraid = (sys.executable, "-m", "unbraid")
    try:
        make_checkpoint(base, dtype)
        make_lora(base, lora)
        print(f"{base.stat().st_size / 1e9:.2f} GB in {dtype}, a LoRA of {lora.stat().st_size / 1e6:.0f} MB")
        print(
            "interpreter with torch: {:.1f} s, {:.2f} GiB".format(
                *timed(sys.executable, "-c", "import unbraid.files.bake, unbraid.files.extract")
            )
        )
        for _ in range(ROUNDS):
            copy.unlink(missing_ok=True)
            print("cp: {:.1f} s, {:.2f} GiB".format(*timed("cp", base, copy)))
            copy.unlink()
            print("bake: {:.1f} s, {:.2f} GiB".format(*timed(*unbraid, "bake", base, lora, "--out", tuned, "--quiet")))
        size = ("--rank", RANK, "--out", again, "--quiet")
        print("extract: {:.1f} s, {:.2f} GiB".format(*timed(*unbraid, "extract", base, tuned, *size)))
        print("the LoRA baked and extracted is off by {:.2e} (worst layer {:.2e})".format(*off(lora, again)))
    finally:
        for path in (base, lora, copy, tuned, again):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "F32" if "fp32" in sys.argv[2:] else "F16")
