"""Drawing with another prompt in one group of blocks, after the experiment of B-LoRA (arXiv 2403.14572).

At every step the base predicts, beside the guided picture, the same latents under the whole other prompt. In the chosen group the
text of the guided row is replaced by the text of that other row. In a UNet the text is the same in all layers. In joint
attention blocks change the text; there the guided row takes its text in all other blocks from a further row, which has the
plain prompt, so that a swap in one block does not go on in the text of the next. Pooled vectors are not swapped: all rows but
the negative one have that of the plain prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from unbraid.bases.base import Base
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.layers import ATTENTION
from unbraid.core.selectors import groups_of
from unbraid.sampling.sample import NEGATIVE, Term, classifier_free, generate

TEXT = "encoder_hidden_states"  # the argument with which a block gets the text
UNSEEN = 1e-30  # the weight of rows that are computed to be read: too small to change a sum


def groups(base: Base, size: int = 1, of_text: bool = True) -> list[tuple[str, ...]]:
    """The groups of blocks that are swapped together: up to `size` neighbours of one kind. `of_text`: to swap what they read.
    Raises UsageError then for a base whose blocks do not get the text as an argument."""
    kinds = base.family.network.layers
    if of_text and not (kinds.own_prompt or kinds.text):
        what = f"the blocks of this {base.family.network.title} read text and picture as one sequence"
        raise UsageError(what, base.name, "Give a base of another family.")
    adapters = Adapters.attach(base.denoiser, ATTENTION, kinds)
    names = groups_of(adapters.layers)
    adapters.detach()
    found: list[list[str]] = []
    for name in names:
        kind = name.rpartition(".")[0]
        if found and len(found[-1]) < size and found[-1][0].rpartition(".")[0] == kind:
            found[-1].append(name)
        else:
            found.append([name])
    return [tuple(some) for some in found]


def drawn(
    base: Base,
    prompts: Mapping[str, Prompt],
    swapped: Sequence[str] = (),
    *,
    guidance: float,
    steps: int,
    seeds: Sequence[int],
) -> list[Image.Image]:
    """A picture per seed of the prompt `main`, whose text is that of `other` in the groups `swapped`. `prompts` has `main`, `other`
    and the negative one."""
    terms = classifier_free(guidance, "main")
    if not swapped:
        return generate(base, terms, prompts, seeds=seeds, steps=steps)
    joint = bool(base.family.network.layers.text)
    roles = ("other", "plain") if joint else ("other",)
    rows = [*terms, *(Term(UNSEEN, role) for role in roles)]
    places = {term.prompt: i for i, term in enumerate(rows)}
    texts = {role: prompts[role] for role in ("main", NEGATIVE)} | {"plain": prompts["main"]}
    texts["other"] = replace(prompts["other"], pooled=prompts["main"].pooled)
    every = [name for some in groups(base) for name in some] if joint else list(swapped)
    sources = {name: "other" if name in swapped else "plain" for name in every}
    with _reading(base.denoiser, sources, places):
        return generate(base, rows, texts, seeds=seeds, steps=steps)


@contextmanager
def _reading(denoiser: nn.Module, sources: Mapping[str, str], places: Mapping[str, int]) -> Iterator[None]:
    """Let the rows of `main` read, in each block, the text of the row that `sources` names. `places`: the index of each term."""
    hooks = []
    for name, source in sources.items():

        def swap(module: Any, args: Any, given: dict[str, Any], source: str = source) -> tuple[Any, dict[str, Any]]:
            parts = list(given[TEXT].chunk(len(places)))
            parts[places["main"]] = parts[places[source]]
            return args, {**given, TEXT: torch.cat(parts)}

        hooks.append(denoiser.get_submodule(name).register_forward_pre_hook(swap, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
