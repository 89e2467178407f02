"""What became of grids that were broken, and the line about it that can be quoted."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from unbraid.runs.job import Job


def differences(todo: Sequence[Job], plain: Path) -> list[str]:
    """The jobs whose LoRAs are not bit for bit those of the plain run."""
    found = []
    for job in todo:
        one, other = (load_file(where / "lora.safetensors") for where in (job.out, plain / job.out.name))
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            found.append(job.out.name)
    return found


def verdict(total: Mapping[str, int]) -> str:
    """What happened in all parts, in one line."""
    jobs, again, other = (total.get(name, 0) for name in ("jobs", "ended twice", "other"))
    kills = total.get("workers killed", 0) + total.get("killed", 0)
    return (
        f"verdict: {'broken' if again or other else 'kept'}. {jobs - again} of {jobs} jobs done exactly once, "
        f"{jobs - other} of {jobs} LoRAs equal bit for bit; {kills} kills of workers, "
        f"{total.get('drivers killed', 0)} of drivers, disk full {total.get('disks full', 0)} times"
    )
