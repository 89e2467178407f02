"""Which layers serve content and which style: as the user says, or as is known for the base."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from unbraid.bases.base import Base
from unbraid.common.errors import UsageError
from unbraid.core.selectors import (
    MEASURE,
    ROLES,
    UNKNOWN,
    Blocks,
    blocks_in,
    chosen,
    known_roles,
    left_out,
    open_blocks,
)
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


def roles_in_drawing(base: Base, given: str = "") -> Blocks:
    """The roles of layers where LoRAs are drawn with: a table by name or file (`given`), else what the base's unbraid.toml states, else what
    was measured on the base, else what is usual in its family. Empty if nothing is known. UsageError for a table of `given` or of
    unbraid.toml whose layers the base has not."""
    own, where = base_defaults(base.name).get("blocks"), "--blocks" if given else Path(base.name) / "unbraid.toml"
    if not given and not own:
        return known_roles(base.name, base.family.name)
    blocks = open_blocks(given) if given else blocks_in(own or {}, where)
    chosen(blocks, (name for name, _ in base.denoiser.named_modules()), where)
    return blocks


def checked_roles(roles: Sequence[str], count: int, given: str = "") -> Sequence[str]:
    """The roles of so many LoRAs. UsageError, before a base is loaded, if their number differs, there is no such role, or `given` is no
    table of roles."""
    if given and not roles:
        raise UsageError(
            "there is no role to look up", "--blocks", "Give --lora-role for each --lora, or leave it out."
        )
    if roles and len(roles) != count:
        raise UsageError(f"{len(roles)} for {count} of --lora", "--lora-role", "Give one per --lora, or none.")
    if unknown := [role for role in roles if role not in (*ROLES, EVERYWHERE)]:
        raise UsageError(
            f"there is no role {unknown[0]!r}", "--lora-role", f"Roles are: {', '.join(ROLES)}, {EVERYWHERE}."
        )
    if given:
        open_blocks(given)
    return roles


def in_role(use: Use, role: str, blocks: Blocks) -> Use:
    """The same use of a LoRA as that of a content or a style LoRA, which does not act in the layers of the other role. Layers without
    a role are both's."""
    return replace(use, without=left_out(blocks, role))


def in_roles(uses: Sequence[Use], roles: Sequence[str], base: Base, given: str = "") -> list[Use]:
    """The uses, each in the role of the same position, `all` for none; all as they are if no roles are given. `given`: as for
    `roles_in_drawing`. UsageError as from `checked_roles`, and if no roles of layers are known."""
    if not set(checked_roles(roles, len(uses), given)) - {EVERYWHERE}:
        return list(uses)
    if not (blocks := roles_in_drawing(base, given)):
        raise UsageError(UNKNOWN, "--lora-role", MEASURE)
    return [use if role == EVERYWHERE else in_role(use, role, blocks) for use, role in zip(uses, roles, strict=True)]
