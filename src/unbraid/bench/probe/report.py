"""What `unbraid probe-blocks` writes: a table, a picture, and a file of roles for `--blocks`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tomli_w
from matplotlib.figure import Figure

from unbraid.bench.probe.loras import LoraPlan
from unbraid.bench.probe.measure import EVERYWHERE, Plan, Row
from unbraid.bench.reports.plots import COLOURS, save
from unbraid.common.atomic import atomic
from unbraid.core.selectors import ROLES

ROLES_FILE = "roles.toml"


def write(rows: Sequence[Row], base: str, names: dict[str, str], plan: Plan | LoraPlan, out: Path) -> list[Path]:
    """Write blocks.json, blocks.png and roles.toml into a folder. The first of `rows` is that of all groups together. `names`: what
    looked at content and at style."""
    whole, *groups = rows
    table = {
        "base": base,
        "seen by": names,
        "plan": {**asdict(plan), "prompts": [plan.pair(i) for i in range(plan.pairs)]},
        EVERYWHERE: {key: value for key, value in asdict(whole).items() if key not in ("modules", "role")},
        "groups": [{"selector": label(row), **asdict(row)} for row in groups],
    }
    files = {"blocks.json": json.dumps(table, indent=1) + "\n", ROLES_FILE: roles(groups, base, names, plan.source)}
    for name, text in files.items():
        with atomic(out / name) as part:
            part.write_text(text, "utf-8")
    return [out / "blocks.json", picture(rows, out / "blocks.png", plan.swapped), out / ROLES_FILE]


def label(row: Row) -> str:
    """The selector of a group: the path of its module, or a range."""
    first, last = row.modules[0], row.modules[-1]
    return first if len(row.modules) == 1 else f"{first}-{last.rpartition('.')[2]}"


def chosen(groups: Sequence[Row], role: str) -> list[str]:
    """The selectors of a role. If no group has it with confidence: that of the group that is nearest to it."""
    some = [label(row) for row in groups if row.role == role]
    sign = 1 if role == "content" else -1
    return some or [
        label(max((row for row in groups if not row.role), key=lambda row: sign * row.lead.mean, default=groups[0]))
    ]


def roles(groups: Sequence[Row], base: str, names: dict[str, str], swapped: str = "") -> str:
    """The text of the file of roles. `swapped`: what was swapped, if not prompts."""
    unsure = [role for role in ROLES if not any(row.role == role for row in groups)]
    source = f"unbraid probe-blocks on {Path(base).name}{swapped}; content seen by {names['content']}, style by {names['style']}"
    if unsure:
        source += f"; no group is {' or '.join(unsure)} with 90 % confidence: the nearest one was taken"
    return tomli_w.dumps({"source": source, **{role: chosen(groups, role) for role in ROLES}}, multiline_strings=False)


def picture(rows: Sequence[Row], path: Path, swapped: str) -> Path:
    """Two bars per group, how far content and style follow it, with 90 % intervals. `swapped`: what the group has alone."""
    labels = [
        EVERYWHERE if i == 0 else label(row) + (f" ({row.role})" if row.role else "") for i, row in enumerate(rows)
    ]
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(rows)), layout="constrained")
    axes, places = figure.subplots(), np.arange(len(rows))[::-1]
    for role, colour, shift in zip(ROLES, COLOURS, (0.2, -0.2), strict=False):
        some = [getattr(row, role) for row in rows]
        spread = np.array([[one.mean - one.low for one in some], [one.high - one.mean for one in some]])
        means = [one.mean for one in some]
        axes.barh(places + shift, means, 0.38, xerr=spread.clip(0), color=colour, label=role, ecolor="#555555")
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_xlabel(f"how far the picture follows {swapped}: 0 not at all, 1 wholly")
    axes.axvline(0, color="#999999", lw=0.8)
    axes.legend(frameon=False, fontsize=8)
    return save(figure, path)
