"""What the commands on LoRA files print."""

import re
from collections import defaultdict
from typing import TYPE_CHECKING

import typer

from unbraid.common.errors import printable

if TYPE_CHECKING:
    from unbraid.files.doctor import Diagnosis
    from unbraid.files.tools import Done


def print_done(done: "Done") -> None:
    """Say what was written."""
    from unbraid.core.selectors import groups_of

    low, high = done.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    kept = (
        "" if done.kept == (1.0, 1.0) else f", kept {done.kept[0]:.1%} of the energy (worst module {done.kept[1]:.1%})"
    )
    more = f", and {len(done.bundled)} embeddings" if done.bundled else ""
    base = "a base that is not known" if done.family == "unknown" else done.family
    typer.echo(f"{done.path}: {done.modules} modules for {base}, {ranks}{kept}{more}")
    for role, modules in done.matched.items():
        where = ", ".join(["", *groups_of(modules)])  # text encoders have no groups
        typer.echo(f"  {role}: {len(modules)} modules{printable(where, 200)}")
    if done.converted[0]:
        count, worst = done.converted
        typer.echo(f"  {count} modules were no LoRA and are one now: off by at most {worst:.2g} of the change")
    if done.vectors:
        typer.echo(f"  {done.vectors} changes of norms and biases are kept beside it: ComfyUI and LyCORIS load them")


def print_diagnosis(one: "Diagnosis", all_keys: bool) -> None:
    """Say what a tool does with a file."""
    verdict = f"refuses it: {one.refused}" if one.refused else f"loads {one.loads} of {one.modules} modules"
    if not one.known:
        verdict = f"nothing is known of what it does with such files ({one.family})"
    typer.echo(f"{one.tool}: {verdict}")
    for warning in one.warnings:
        typer.echo(f"  warning: {printable(warning, 200)}")
    reasons: dict[str, list[str]] = defaultdict(list)
    for key, why in one.dropped.items():
        reasons[re.sub(r": \S+…$", "", why[:300])].append(key)
    for why, keys in reasons.items():
        typer.echo(f"  drops {len(keys)} keys: {printable(why)}")
        for key in keys if all_keys else keys[:2]:
            typer.echo(f"    {printable(key, 160)}")
