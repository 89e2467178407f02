"""Training the factors of many layers as a few large tensors.

An adapter has thousands of small tensors. The optimiser, the clipping and a method's hooks would need one call for each
of them. So the factors of all layers with the same shapes are stacked, and the stacks are trained. The tensors of a
layer are views of the stacks, so a change of one is a change of the other.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from unbraid.core.lora import Factors, Place

M = TypeVar("M", bound=nn.Module)
Layers = Mapping[str, Mapping[str, Factors]]  # layer → adapter → factors


@dataclass(frozen=True)
class Group:
    """Layers whose adapters have the same form (tensor names, shapes, dtypes, scale), and each adapter's stacked factors."""

    names: Sequence[str]
    own_prompt: bool
    factors: Mapping[str, Factors]


def grouped(layers: Layers, own_prompt: frozenset[str]) -> Iterator[Group]:
    """Yield all layers in groups of the same form. `own_prompt`: the layers in which adapters can read their own
    prompts; they are never in a group with other layers."""
    groups = defaultdict[tuple[object, ...], list[str]](list)
    for name, adapters in layers.items():
        kinds = [(adapter, id(one.place.stack) if one.place else _form(one)) for adapter, one in adapters.items()]
        groups[(name in own_prompt, *kinds)].append(name)
    for (own, *_), names in groups.items():
        parts = {adapter: [layers[name][adapter] for name in names] for adapter in layers[names[0]]}
        yield Group(names, bool(own), {adapter: stack(some) for adapter, some in parts.items()})


def stack(parts: Sequence[Factors]) -> Factors:
    """The factors of one adapter in several layers of one form, stacked along a new first dimension. Gradients flow back
    to the layers' factors. If those are packed already, the result is their stack, or a selection from it."""
    first = parts[0]
    if first.place is None:
        return _with(first, lambda name: torch.stack([_tensor(one, name) for one in parts]))
    whole, places = first.place.stack, [one.place.index for one in parts if one.place]
    if places == list(range(len(whole.down))):
        return whole
    index = _index(tuple(places), whole.down.device)
    return _with(whole, lambda name: _tensor(whole, name).index_select(0, index))


@lru_cache(1024)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """An index tensor. It is cached because sending it to the device at every step would wait for the step before."""
    return torch.tensor(places, device=device)


def pack(layers: Layers, own_prompt: frozenset[str]) -> None:
    """Stack the factors of all layers. The stacks are trained instead, and the layers' tensors become views of them.
    Afterwards a layer's tensors may be changed in place, but must not be replaced."""
    for adapters in layers.values():
        for one in adapters.values():
            one.place = None
    for group in list(grouped(layers, own_prompt)):
        for adapter, connected in group.factors.items():
            parts = [layers[name][adapter] for name in group.names]
            whole = _with(connected, partial(_leaf, connected, dict(parts[0].named_parameters())))
            for i, part in enumerate(parts):
                for name, _ in [*part.named_parameters(), *part.named_buffers()]:
                    _view(part, name, _tensor(whole, name).detach()[i])
                part.place = Place(whole, i)


def _form(factors: Factors) -> tuple[object, ...]:
    tensors = [*factors.named_parameters(), *factors.named_buffers()]
    return (factors.scale, *((name, one.shape, one.dtype) for name, one in tensors))


def _leaf(stacked: Factors, parameters: Mapping[str, nn.Parameter], name: str) -> Tensor:
    values, like = _tensor(stacked, name).detach(), parameters.get(name)
    if name == "up":
        values = values.mT.contiguous().mT  # stored rank by rank, because adapters are concatenated along their ranks
    return values if like is None else nn.Parameter(values, like.requires_grad)


def _tensor(module: nn.Module, path: str) -> Tensor:
    *owners, leaf = path.split(".")
    for owner in owners:
        module = getattr(module, owner)
    found = getattr(module, leaf)
    assert isinstance(found, Tensor)
    return found


def _view(module: nn.Module, path: str, value: Tensor) -> None:
    """Replace a parameter (by one without gradient) or a buffer by `value`. `path`: its dotted name."""
    *owners, leaf = path.split(".")
    owner = module.get_submodule(".".join(owners))
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if leaf in owner._parameters else value)


def _with(module: M, value: Callable[[str], Tensor], path: str = "") -> M:
    """A copy of a module with other tensors, `value(name)`. They are plain attributes, because a parameter cannot be the
    result of a computation through which gradients flow."""
    made = copy.copy(module)
    made.__dict__ = dict(module.__dict__)
    tensors = module._parameters | module._buffers | {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
    made._parameters, made._buffers = {}, {}
    for name, old in tensors.items():
        made.__dict__[name] = None if old is None else value(path + name)
    made._modules = {
        name: None if child is None else _with(child, value, f"{path}{name}.")
        for name, child in module._modules.items()
    }
    return made
