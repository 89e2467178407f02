"""Tools to measure training: SDXL's UNet with random weights, FLOPs, bytes kept for gradients, and times of alternatives side by side."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unbraid.bench.rows.cost import ATTENTION_FLOPS

# One of several ways to do the same steps: a context that prepares and cleans up, and gives the function that is timed.
Way = Callable[[], AbstractContextManager[Callable[[], None]]]
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


VAE: dict[str, Any] = {  # Any: diffusers' annotations reject these values, which it accepts
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}


class Meter:
    """Measures calls: `flops`, and `kept`, the bytes of the tensors that are kept for the backward pass, without the model's weights."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.flops, self.kept = 0, 0

    def __call__(self, run: Callable[[], Tensor], grad: bool, calls: int = 1) -> None:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.weights:
                seen[storage._cdata] = storage.nbytes()
            return tensor

        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
        with counter, torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = run()
            kept = sum(seen.values())
            if grad:
                out.float().sum().backward()
        self.flops += calls * counter.get_total_flops()
        self.kept += kept


def encoder_flops(side: int) -> int:
    """FLOPs of SDXL's encoder (of the autoencoder) for one square picture with `side` pixels."""
    vae = AutoencoderKL(**VAE)
    meter = Meter(vae)
    meter(lambda: vae.encode(torch.randn(1, 3, side, side)).latent_dist.mode(), grad=False)  # type: ignore[union-attr]
    return meter.flops


def sdxl(side: int) -> tuple[UNet2DConditionModel, Callable[[int], Tensor]]:
    """SDXL's UNet with random weights, and a function that calls it on a batch of b random square pictures of `side` pixels. Equal batch
    sizes get equal prompts."""
    unet = UNet2DConditionModel(**SDXL).requires_grad_(False).eval()  # type: ignore[arg-type]
    prompts: dict[int, Tensor] = {}

    def call(b: int) -> Tensor:
        added = {"text_embeds": torch.randn(b, 1280), "time_ids": torch.randn(b, 6)}
        prompt = prompts.setdefault(b, torch.randn(b, 77, 2048))
        return unet(torch.randn(b, 4, side // 8, side // 8), torch.zeros(b), prompt, added_cond_kwargs=added).sample

    return unet, call


def wait() -> None:
    """Wait until the GPU is done, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def side_by_side(ways: Mapping[str, Way], steps: int, rounds: int) -> list[tuple[str, float]]:
    """(name, median seconds per step) of several ways to do `steps` steps. They take turns, so that a slow minute affects all of them; the
    first round is a warm-up and not counted. Without a GPU this is CPU time: with one thread it equals wall-clock time on an idle machine,
    and it stays meaningful on a busy one."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            with way() as go:
                began = clock()
                go()
                if i:
                    spent[name].append((clock() - began) / steps)
    return [(name, statistics.median(values)) for name, values in spent.items()]
