"""Frozen layers whose weights are stored in 8-bit floats (fp8). They are cast to the dtype of the input in the forward
pass, and cast again in the backward pass.

The weight is a buffer, so it is not trained, and autograd saves the 8-bit tensor, not the cast copy."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

STORAGE = torch.float8_e4m3fn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return gradient @ weight.to(gradient.dtype), None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "Fp8Conv2d") -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer._conv_forward(x, layer.weight.to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer, (gradient,) = ctx.layer, gradients
        weight = layer.weight.to(gradient.dtype)
        given = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return conv2d_input(ctx.shape, weight, gradient, *given), None


class Fp8Linear(nn.Linear):
    """A frozen linear layer with its weight `[d, k]` in fp8."""

    def forward(self, input: Tensor) -> Tensor:
        return _Linear.apply(input, self.weight, self.bias)  # type: ignore[return-value]


class Fp8Conv2d(nn.Conv2d):
    """A frozen convolution with its weight in fp8. It must pad with zeros."""

    def forward(self, input: Tensor) -> Tensor:
        return _Convolution.apply(input, self)  # type: ignore[return-value]


def store_in_fp8(model: nn.Module) -> None:
    """Convert the weights of all linear layers and convolutions to fp8, in place. Layers with `norm` in their name are left
    as they are, and so are those that diffusers excludes for the model, because their code looks at the weight's dtype."""
    excluded = ("norm", *(getattr(model, "_skip_layerwise_casting_patterns", None) or ()))
    for name, module in model.named_modules():
        kind = {nn.Linear: Fp8Linear, nn.Conv2d: Fp8Conv2d}.get(type(module))
        if kind is None or any(part in name for part in excluded):
            continue
        weight = module.weight.detach().to(STORAGE)  # type: ignore[union-attr]
        module.__class__ = kind
        del module.weight
        module.register_buffer("weight", weight)
