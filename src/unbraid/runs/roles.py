"""Which layers serve content and which style in a run: as the user says, or as the base's own file states."""

from pathlib import Path

from unbraid.common.errors import UsageError
from unbraid.core.selectors import Blocks, blocks_in, open_blocks
from unbraid.methods import METHODS
from unbraid.runs.job import Job
from unbraid.runs.settings import base_defaults


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
