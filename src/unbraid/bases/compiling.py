"""torch.compile for a model's transformer blocks. They contain the adapters and most of the small operators, and few of
them differ. Compiling the whole model would take many minutes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

BACKEND = "inductor"
MOST = 64  # compiled variants of a block: they differ in width, number of rows, and which tensors get a gradient


def compile_blocks(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (BasicTransformerBlock,)) -> None:
    """Let torch compile each block of these classes when it is first called."""
    import torch._dynamo.config as config  # this import takes seconds

    config.recompile_limit = MOST
    for block in (one for one in model.modules() if isinstance(one, kinds)):
        block.compile(backend=BACKEND, dynamic=False)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run the blocks without compilation, for passes that are too few to be worth it."""
    if all(one._compiled_call_impl is None for one in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
