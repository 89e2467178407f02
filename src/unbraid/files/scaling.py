"""A LoRA file's modules, scaled by block or left out by role."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

from torch import Tensor

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.selectors import MEASURE, ROLES, UNKNOWN, Blocks, known_roles, left_out, selects
from unbraid.files.formats.block_weights import block_weights
from unbraid.files.lora_file import LoraFile
from unbraid.files.made_for import BASE


def scaled(
    lora: LoraFile, rules: Sequence[str] = (), strength: float = 1.0
) -> tuple[dict[str, Lora], dict[str, Tensor]]:
    """A LoRA's modules and vectors, scaled by block rules and `strength`. Modules are scaled by their alpha, so that no factor is rounded.
    Those with weight 0 are removed."""
    if not isfinite(strength):
        raise UsageError(f"a strength of {strength}", "--strength", "Give a number such as 0.8.")
    vectors = owners(lora)
    named = {**lora.modules, **dict.fromkeys(vectors.values())}
    weights = {name: weight * strength for name, weight in block_weights(named, rules, lora.family).items()}
    modules = {
        name: Lora(one.down, one.up, one.alpha * weights[name]) for name, one in lora.modules.items() if weights[name]
    }
    return modules, {key: lora.vectors[key] * weights[owner] for key, owner in vectors.items() if weights[owner]}


def owners(lora: LoraFile) -> dict[str, str]:
    """Key of a vector → its module."""
    return {key: key.rpartition(".")[0] for key in lora.vectors}


def roles_of(lora: LoraFile, family: str) -> Blocks:
    """The roles of layers that are known for the base that a LoRA was made for, or for its family. Empty if none are."""
    return known_roles(lora.metadata.get(BASE, ""), family)


def of_role(lora: LoraFile, role: str, roles: Blocks | None = None) -> tuple[LoraFile, tuple[str, ...]]:
    """The same LoRA without the layers of the other role, and the names of the modules that it leaves out. Layers without a role, text
    encoders and embeddings are kept. `roles`: of layers, else `roles_of`.

    Raises UsageError if there is no such role, none are known, no module is to be left out, or nothing else is there."""
    if role not in ROLES:
        raise UsageError(f"there is no role {role!r}", "--lora-role", f"Roles are: {', '.join(ROLES)}.")
    roles = roles or roles_of(lora, lora.family)
    if not roles:
        raise UsageError(UNKNOWN, "--lora-role", MEASURE)
    vectors = owners(lora)
    names = dict.fromkeys([*lora.modules, *vectors.values()])
    left = tuple(name for name in names if selects(left_out(roles, role), name))
    (other,) = (one for one in ROLES if one != role)
    if not left:
        fix = f"Nothing has to be left out. The table has {', '.join(left_out(roles, role))}."
        raise UsageError(f"no layer of the file serves {other}", "--lora-role", fix)
    if len(left) == len(names):
        raise UsageError(f"all layers of the file serve {other}", "--lora-role", f"Give --lora-role {other}.")
    modules = {name: one for name, one in lora.modules.items() if name not in left}
    kept = {key: lora.vectors[key] for key, owner in vectors.items() if owner not in left}
    errors = {name: error for name, error in lora.errors.items() if name not in left}
    return replace(lora, modules=modules, vectors=kept, errors=errors), left
