"""Block swap: the frozen weights of some blocks of a network stay on the host. They are copied to the device before a block
runs, in the forward pass and again when gradient checkpointing runs it in the backward pass.

On the device there are two buffers, as large as the largest of these blocks. While one block computes, the next one is
copied into the other buffer; on CUDA by a stream of its own, from pinned memory. Blocks are called through hooks. The hooks
set a block's parameters to views of a buffer, and back to the host's afterwards, so that outside of its calls a block has
its right weights, on the host.

diffusers' group offloading is made for drawing. It moves the parameters of adapters as well, away from their gradients and
moments; it moves weights back after the forward pass by setting their data, which the backward pass then finds on the host;
and it does not unload a block whose recomputation ends early, as torch's checkpoints do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNED = 256  # bytes: each weight begins at a multiple
BUFFERS = 2


@dataclass(frozen=True)
class Weight:
    """A frozen tensor of a module, a parameter or a buffer. `begin`: where it is in the block's memory, in bytes."""

    module: nn.Module
    name: str
    host: Tensor
    begin: int

    def put(self, value: Tensor) -> None:
        """Set the module's tensor."""
        kind: Any = self.module._parameters if self.name in self.module._parameters else self.module._buffers
        kind[self.name] = value

    def within(self, memory: Tensor) -> Tensor:
        """The view of it in a block's memory, which may be on another device."""
        return _view(memory, self.begin, self.host)


def frozen_bytes(block: nn.Module) -> int:
    """The memory of a block's weights. Call it before adapters are attached."""
    return sum(_room(one) for _, _, one in _tensors(block))


def evenly(count: int, of: int) -> list[int]:
    """`count` of so many blocks, at equal distances: the copy of one has the time of those between them."""
    return [int((i + 0.5) * of / count) for i in range(count)]


def home(module: nn.Module) -> torch.device:
    """The device on which a linear layer computes. A swapped one has its weight elsewhere meanwhile."""
    found: Any = module.__dict__.get("home")
    weight: Any = module.weight
    return found or weight.device


class Swap:
    """The blocks of a network whose weights stay on the host. `blocks`: in the order in which they run, on the host."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self.memory, self.weights = list[Tensor](), list[list[Weight]]()
        for block in blocks:
            self._take(block)
        self.buffers = [torch.empty(0, dtype=torch.uint8)] * min(BUFFERS, len(blocks))
        self.holds: list[int | None] = [None] * len(self.buffers)  # which block is in each buffer
        self.views: list[list[list[Tensor]]] = []  # buffer → block → its weights
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self._enter(i))
            # torch ends a recomputation by an exception once it has all that it needs
            block.register_forward_hook(lambda *_, i=i: self._leave(i), always_call=True)

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """Leave the weights out of the network while it is moved to the device. Then allocate the buffers there."""
        every = [weight for some in self.weights for weight in some]
        for one in every:
            empty = one.host.new_empty(0)
            one.put(nn.Parameter(empty, requires_grad=False) if isinstance(one.host, nn.Parameter) else empty)
        try:
            yield
        finally:
            for one in every:
                one.put(one.host)
                one.module.__dict__["home"] = self.device
        most = max(len(one) for one in self.memory)
        self.buffers = [torch.empty(most, dtype=torch.uint8, device=self.device) for _ in self.buffers]
        self.views = [[[one.within(buffer) for one in some] for some in self.weights] for buffer in self.buffers]

    def _take(self, block: nn.Module) -> None:
        """Copy a block's weights into memory of their own, in one piece."""
        found = list(_tensors(block))
        size = sum(_room(one) for _, _, one in found)
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        weights, begin = list[Weight](), 0
        for module, name, tensor in found:
            host = _view(memory, begin, tensor)
            host.copy_(tensor.detach())
            weights.append(Weight(module, name, host, begin))
            weights[-1].put(host)
            begin += _room(tensor)
        self.memory.append(memory)
        self.weights.append(weights)

    def _enter(self, i: int) -> None:
        buffer = self._bring(i)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        for weight, view in zip(self.weights[i], self.views[buffer][i], strict=True):
            weight.put(view)
        if len(self.buffers) > 1:
            self._bring(self._after(i), keep=buffer)

    def _leave(self, i: int) -> None:
        for weight in self.weights[i]:
            weight.put(weight.host)

    def _after(self, i: int) -> int:
        """The block that is needed next."""
        last = len(self.weights) - 1
        if torch._C._current_graph_task_id() != -1:  # in the backward pass, as torch's checkpoints find out too
            return i - 1 if i else 1
        if i == last:
            return last - 1 if torch.is_grad_enabled() else 0
        return i + 1

    def _bring(self, i: int, keep: int | None = None) -> int:
        """Copy a block to the device, unless it is there. `keep`: the buffer in use. Returns its buffer."""
        if i in self.holds:
            return self.holds.index(i)
        buffer = next(one for one in range(len(self.buffers)) if one != keep)
        self.holds[buffer] = i
        memory = self.memory[i]
        target = self.buffers[buffer][: len(memory)]
        if not self.stream:
            target.copy_(memory)
            return buffer
        # what the device has been told so far may read the buffer; what it is told from now on runs beside the copy
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(memory, non_blocking=True)
        return buffer


def _tensors(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in block.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield module, name, tensor


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED


def _view(memory: Tensor, begin: int, like: Tensor) -> Tensor:
    end = begin + like.numel() * like.element_size()
    view = memory[begin:end].view(like.dtype).view(like.shape)
    return nn.Parameter(view, requires_grad=False) if isinstance(like, nn.Parameter) else view
