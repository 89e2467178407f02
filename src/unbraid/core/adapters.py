"""Adapters on a model: the layer that carries them, and which adapters are active on which rows of a batch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unbraid.common.errors import UnsuitedError, UsageError
from unbraid.core.layers import ATTENTION, UNET, Layers
from unbraid.core.lora import Active, Factors, Lora
from unbraid.core.packing import grouped, pack
from unbraid.core.selectors import selects
from unbraid.core.stacked import Added, stacked
from unbraid.core.swap import home

COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # not fp8, which only stores weights
MOST_PROMPTS, MOST_ROWS = 8, 8  # limits of the cache of keys and values, which takes 26 MB per prompt in SDXL


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The type that a model computes in, whatever it stores most weights in. It is that of the first parameter that is not in
    fp8: in every network here that is one of its own, and not an adapter's, which are in full precision. diffusers' own
    `model.dtype` walks through all modules, which takes milliseconds in SDXL, at every step."""
    return next(weight.dtype for weight in model.parameters() if weight.dtype in COMPUTED)


class AdaptedLinear(nn.Module):
    """A frozen linear layer, W0, and the adapters on it."""

    def __init__(self, base: nn.Linear, own_prompt: bool) -> None:
        super().__init__()
        self.base = base
        self.added: Added | None = None  # what the active adapters add to W0 x
        self.own_prompt = own_prompt  # whether an adapter can read its own prompt in this layer
        self.adapters = nn.ModuleDict()
        self._known: dict[int, tuple[Tensor, int, Tensor]] = {}  # id(x) → (x, version of x, W0 x)

    @property
    def weight(self) -> Tensor:  # diffusers' attention code looks at its projections' weights
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def factors(self) -> dict[str, Factors]:
        """Adapter name → its factors in this layer."""
        return cast(dict[str, Factors], dict(self.adapters.items()))

    def forward(self, x: Float[Tensor, "b *n k"]) -> Float[Tensor, "b *n d"]:
        y = self._frozen(x)
        return y if self.added is None else self.added.to(y, x)

    def _frozen(self, x: Tensor) -> Tensor:
        """W0 x. A prompt is the same tensor object at every step (`base.conditions`), so its W0 x is computed once and
        cached. Compiled code skips the cache, because torch.compile cannot check the identity of a tensor."""
        if not self.own_prompt or x.requires_grad or len(x) > MOST_ROWS or torch.compiler.is_compiling():
            return self.base(x)
        known = self._known.get(id(x))
        if known is None or known[0] is not x or known[1] != x._version:
            if len(self._known) == MOST_PROMPTS:
                self._known.clear()
            known = self._known[id(x)] = (x, x._version, self.base(x))
        return known[2]


@dataclass
class Adapters:
    """The adapters on one model: attach, activate, detach."""

    layers: dict[str, AdaptedLinear]
    model: nn.Module
    names: list[str] = field(default_factory=list)
    kinds: Layers = UNET  # which layers the model has
    alpha: float = 0.0  # adapters made by `new` are multiplied by alpha / rank; 0: by 1
    scaled: set[str] = field(default_factory=set)  # the adapters that were made with this alpha

    @classmethod
    def attach(cls, model: nn.Module, targets: str = ATTENTION, kinds: Layers = UNET) -> "Adapters":
        """Replace every linear layer of the group `targets` (see `Layers.pattern`) by an adapted layer that has no
        adapters yet. Raises UnsuitedError if there is no such layer."""
        pattern = re.compile(kinds.pattern(targets))
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and pattern.search(n)]
        if not names:
            raise UnsuitedError("no linear layer of the base matches", targets, "Check the targets expression.")
        return cls.attach_named(model, names, kinds)

    @classmethod
    def attach_named(cls, model: nn.Module, names: Sequence[str], kinds: Layers = UNET) -> "Adapters":
        """Like `attach`, for a list of names. All of them must be linear layers of `model`."""
        layers = {}
        for name in names:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layers[name] = AdaptedLinear(linear, kinds.reads_own_prompt(name))
        place(model, layers)
        return cls(layers, model, kinds=kinds)

    def detach(self) -> None:
        """Put the original linear layers back. The model is then bit for bit what it was before `attach`."""
        place(self.model, {name: layer.base for name, layer in self.layers.items()})

    def attach_again(self) -> None:
        """Undo `detach`."""
        place(self.model, self.layers)

    def add(self, adapter: str, factors: Mapping[str, Factors], where: object = None) -> None:
        """Add an adapter. `factors`: layer name → factors. `where`: the adapter's file, for the error message.
        Raises UsageError if a shape does not fit its layer."""
        for name, new in factors.items():
            base = self.layers[name].base
            if new.down.shape[1] != base.in_features or new.up.shape[0] != base.out_features:
                shapes = f"{tuple(new.up.shape)}·{tuple(new.down.shape)} for a layer {tuple(base.weight.shape)}"
                raise UsageError(f"{name}: wrong shapes {shapes}", where or adapter, "It was made for another base.")
            self.layers[name].adapters[adapter] = new.to(home(base))
        self.names.append(adapter)

    def new(
        self,
        adapter: str,
        rank: int,
        rng: torch.Generator,
        up_std: float = 0.0,
        down_std: float | None = None,
        within: Sequence[str] = (),
    ) -> None:
        """Add a new adapter to every layer, or to those that the selectors `within` select.

        `down_std` and `up_std` are standard deviations. By default, down ~ N(0, 1/r), and up = 0 so that the model's
        output does not change. Raises UsageError if no layer is found or the rank does not fit."""
        layers = {name: layer for name, layer in self.layers.items() if not within or selects(within, name)}
        if not layers:
            raise UsageError("this base has no attention there", ", ".join(within), "The method needs another base.")
        highest = min(min(layer.base.weight.shape) for layer in layers.values())
        if not 1 <= rank <= highest:
            raise UsageError(f"rank {rank} does not fit this base", "rank", f"Choose 1 to {highest}.")
        made = {}
        for name, layer in layers.items():
            d, k = layer.base.weight.shape
            down = torch.randn(rank, k, generator=rng) * (rank**-0.5 if down_std is None else down_std)
            up = torch.randn(d, rank, generator=rng) * up_std if up_std else torch.zeros(d, rank)
            made[name] = Factors(down, up, self.alpha / rank if self.alpha else 1.0)
        self.scaled |= {adapter} if self.alpha else set()
        self.add(adapter, made)

    def of(self, adapter: str) -> dict[str, Factors]:
        """Layer name → the factors of one adapter."""
        found = {name: layer.adapters[adapter] for name, layer in self.layers.items() if adapter in layer.adapters}
        return {name: factors for name, factors in found.items() if isinstance(factors, Factors)}

    def pack(self) -> None:
        """Put the factors of all layers with equal shapes into one stack, which is trained instead of them. Can be
        called again after the shapes have changed."""
        pack(*self._factors())

    def pieces(self) -> list[dict[str, Factors]]:
        """What is trained: one item (adapter name → factors) for every stack of layers, or, if nothing is packed, for
        every layer."""
        found = {}
        for layer in self.layers.values():
            some = {name: one.place.stack if one.place else one for name, one in layer.factors().items()}
            found[tuple(id(one) for one in some.values())] = some
        return list(found.values())

    def pieces_of(self, adapter: str) -> list[Factors]:
        return [some[adapter] for some in self.pieces() if adapter in some]

    def training(self) -> list[nn.Parameter]:
        """All trained parameters, each once."""
        every = [p for some in self.pieces() for one in some.values() for _, p in one.parts() if p.requires_grad]
        return list(dict.fromkeys(every))

    def constants(self) -> list[Tensor]:
        """The prompts that the layers have cached, and the cached keys and values (see `AdaptedLinear._frozen`)."""
        return [one for layer in self.layers.values() for x, _, y in layer._known.values() for one in (x, y)]

    def _factors(self) -> tuple[dict[str, dict[str, Factors]], frozenset[str]]:
        layers = {name: layer.factors() for name, layer in self.layers.items()}
        return layers, frozenset(name for name, layer in self.layers.items() if layer.own_prompt)

    def folded(self, adapter: str, gates: bool = True) -> dict[str, Lora]:
        """One adapter as plain low-rank changes on the CPU, with its mergers folded in (see `Factors.folded`)."""
        return {name: factors.folded(gates) for name, factors in self.of(adapter).items()}

    @contextmanager
    def activate(
        self, rows: Sequence[tuple[Active, ...]], prompts: Mapping[str, Float[Tensor, "n c"]] | None = None
    ) -> Iterator[None]:
        """Set which adapters are active on each row of the batches inside the `with` block. `prompts`: the embeddings
        that adapters with their own prompt read, by name. Call `backward()` inside the block too, because gradient
        checkpointing runs the layers again there. Raises UsageError for an unknown adapter."""
        if unknown := [one.adapter for row in rows for one in row if one.adapter not in self.names]:
            there = ", ".join(self.names)
            raise UsageError(f"no adapter {unknown[0]!r}", "activate", f"There are: {there}.")
        before = {name: layer.added for name, layer in self.layers.items()}
        awake = [tuple(one for one in row if one.scale) for row in rows]
        texts = frozenset(name for name in self.layers if self.kinds.reads_text(name))
        self._add(stacked(grouped(*self._factors()), awake, prompts or {}, compute_dtype(self.model), texts))
        try:
            yield
        finally:
            self._add(before)

    def _add(self, added: Mapping[str, Added | None]) -> None:
        for name, layer in self.layers.items():
            layer.__dict__["added"] = added.get(name)  # nn.Module.__setattr__ is slow, and there are hundreds of layers


def place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set submodules of `model` by name. Jobs that share one model do this at every step, so each parent module is
    looked up only once, for speed."""
    parents: dict[str, nn.Module] = {"": model}
    for name, module in modules.items():
        path, _, leaf = name.rpartition(".")
        if path not in parents:
            parents[path] = model.get_submodule(path)
        parents[path]._modules[leaf] = module
