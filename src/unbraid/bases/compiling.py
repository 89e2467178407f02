"""torch.compile of a model's transformer blocks: there are few different ones, where the adapters and most of the small operators are. Compiling the
whole model takes many minutes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

BACKEND = "inductor"
MOST = 64  # forms of a block that are compiled: by width, rows, what gets a gradient


def compile_blocks(model: nn.Module) -> None:
    import torch._dynamo.config as config  # seconds, for those who ask for it

    config.recompile_limit = MOST
    for block in _blocks(model):
        block.compile(backend=BACKEND, dynamic=False)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """For passes that are too few to be worth a compilation of their own."""
    if all(block._compiled_call_impl is None for block in _blocks(model)):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _blocks(model: nn.Module) -> Iterator[BasicTransformerBlock]:
    return (one for one in model.modules() if isinstance(one, BasicTransformerBlock))
