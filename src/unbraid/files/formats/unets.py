"""The modules of SDXL's, SD1.5's and SD2.1's UNets, generated from their depths. Pure Python."""

from collections.abc import Iterator
from functools import cache

from unbraid.files.formats.blocks import Family


@cache
def unet_modules(family: Family) -> frozenset[str]:
    """The diffusers paths of every linear layer and convolution in a family's UNet, 794 for SDXL. Empty for families without a UNet."""
    if family == "sdxl":
        return frozenset(_unet((0, 2, 10), 10, (10, 2, 0), True))
    return frozenset(_unet((1, 1, 1, 0), 1, (0, 1, 1, 1), False)) if family in ("sd15", "sd21") else frozenset()


def _unet(down: tuple[int, ...], mid: int, up: tuple[int, ...], added: bool) -> Iterator[str]:
    yield from ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    if added:
        yield from ("add_embedding.linear_1", "add_embedding.linear_2")
    for i, depth in enumerate(down):
        for j in range(2):
            # the number of channels changes at the start of the second and third level
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", i in (1, 2) and j == 0)
            yield from _attention(f"down_blocks.{i}.attentions.{j}", depth)
        if i + 1 < len(down):
            yield f"down_blocks.{i}.downsamplers.0.conv"
    for j in range(2):
        yield from _resnet(f"mid_block.resnets.{j}", False)
    yield from _attention("mid_block.attentions.0", mid)
    for i, depth in enumerate(up):
        for j in range(3):
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", True)
            yield from _attention(f"up_blocks.{i}.attentions.{j}", depth)
        if i + 1 < len(up):
            yield f"up_blocks.{i}.upsamplers.0.conv"


def _resnet(name: str, shortcut: bool) -> Iterator[str]:
    yield from (f"{name}.{leaf}" for leaf in ("conv1", "conv2", "time_emb_proj"))
    if shortcut:
        yield f"{name}.conv_shortcut"


def _attention(name: str, depth: int) -> Iterator[str]:
    if depth:
        yield from (f"{name}.proj_in", f"{name}.proj_out")
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        yield from (f"{block}.attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0"))
        yield from (f"{block}.ff.net.0.proj", f"{block}.ff.net.2")
