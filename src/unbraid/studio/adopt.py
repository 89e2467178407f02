"""Runs that studios before this one have queued: the words of their command line are in task.json, and they have no job.toml."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from unbraid.common.atomic import atomic, read_toml
from unbraid.common.errors import UsageError
from unbraid.methods import METHODS
from unbraid.runs import folder as run_folder
from unbraid.runs import job_folder
from unbraid.studio import process
from unbraid.studio.safety import Home

TASK = "task.json"


def adopt(home: Home) -> None:
    """Make job folders of the old runs that have begun and are not at work: run.toml has the form of a job.toml.

    The others stay as they are."""
    for task in home.runs.glob(f"*/{TASK}"):
        with suppress(OSError, UsageError, LookupError, TypeError):
            if home.contains(task) and run_folder.begun(task.parent) and not process.found(task.parent):
                _adopt(task)


def _adopt(task: Path) -> None:
    folder, old = task.parent, process.read_json(task)
    record = read_toml(folder / run_folder.RECORD, "")
    stems = METHODS[record["method"]].outputs(record[record["method"]])
    with atomic(folder / run_folder.JOB) as part:
        shutil.copyfile(folder / run_folder.RECORD, part)
    if all((folder / f"{one}.safetensors").exists() for one in stems) and not (folder / run_folder.STATE).exists():
        job_folder.mark_done(folder)
    if isinstance(since := old.get("since"), int | float):
        os.utime(folder / run_folder.JOB, (since, since))
    if isinstance(stop := old.get("stop"), int | float):
        process.write_json(folder / process.RECORD, process.record(folder) | {"stop": stop})
    task.unlink()
