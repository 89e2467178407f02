"""Which layers serve content and which style: as the user says, or as is known for the base."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from unbraid.bases.base import Base
from unbraid.common.errors import UsageError
from unbraid.core.selectors import ROLES, TABLES, Blocks, blocks_in, chosen, open_blocks
from unbraid.methods import METHODS
from unbraid.runs.job import Job
from unbraid.runs.settings import base_defaults
from unbraid.sampling.uses import Use

EVERYWHERE = "all"  # the role of a LoRA that acts in all its layers


def roles_of_layers(job: Job, given: str) -> Blocks:
    """`given`: a published table by name, or a TOML file; else the table `blocks` of the base's unbraid.toml counts. Empty, without
    either, and for a method that treats all layers alike: UsageError if `given` is for such a method."""
    reads = METHODS[job.method].inputs.reads_blocks and job.settings.get("block_separation") is not False
    if given and not reads:
        raise UsageError(f"{job.method} treats all layers alike", "--blocks", "Use --method blora, or leave it out.")
    if given:
        return open_blocks(given)
    own = base_defaults(job.base).get("blocks")
    return blocks_in(own, Path(job.base) / "unbraid.toml") if own and reads else {}


def roles_in_drawing(base: str, family: Blocks, given: str = "") -> Blocks:
    """The roles of layers where LoRAs are drawn with: a table by name or file (`given`), else the table that bears the base's name, else
    what the base's unbraid.toml states, else what is published for its `family`. Empty if nothing is known."""
    if given:
        return open_blocks(given)
    if base in TABLES:
        return TABLES[base].blocks
    own = base_defaults(base).get("blocks")
    known = blocks_in(own, Path(base) / "unbraid.toml") if own else family
    return known if all(known.get(role) for role in ROLES) else {}


def in_role(use: Use, role: str, blocks: Blocks) -> Use:
    """The same use of a LoRA as that of a content or a style LoRA, which does not act in the layers of the other role. Layers without
    a role are both's."""
    (other,) = (one for one in ROLES if one != role)
    return replace(use, without=tuple(blocks.get(other, ())))


def in_roles(uses: Sequence[Use], roles: Sequence[str], base: Base, given: str = "") -> list[Use]:
    """The uses, each in the role of the same position, `all` for none; all as they are if no roles are given. `given`: as for
    `roles_in_drawing`. UsageError if the counts differ, there is no such role, no roles of layers are known, or those given are of
    layers that the base has not."""
    if given and not roles:
        raise UsageError(
            "there is no role to look up", "--blocks", "Give --lora-role for each --lora, or leave it out."
        )
    if not roles:
        return list(uses)
    if len(roles) != len(uses):
        fix = "Give one per --lora, or none."
        raise UsageError(f"{len(roles)} roles for {len(uses)} LoRAs", "--lora-role", fix)
    if unknown := [role for role in roles if role not in (*ROLES, EVERYWHERE)]:
        raise UsageError(
            f"there is no role {unknown[0]!r}", "--lora-role", f"Roles are: {', '.join(ROLES)}, {EVERYWHERE}."
        )
    blocks = roles_in_drawing(base.name, base.family.blocks, given)
    if given:
        chosen(blocks, (name for name, _ in base.denoiser.named_modules()), "--blocks")
    if not blocks and set(roles) != {EVERYWHERE}:
        fix = "Give --blocks (`unbraid probe-blocks` measures them), or leave it out."
        raise UsageError("which layers of this base serve content, and which style, is not known", "--lora-role", fix)
    return [use if role == EVERYWHERE else in_role(use, role, blocks) for use, role in zip(uses, roles, strict=True)]
