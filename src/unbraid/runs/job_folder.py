"""A job folder: a run that is written down before it begins, so that any worker on any machine can take it up.

`job.toml` has the form of a run.toml and comes first. Everything else is as in every run folder: the worker writes run.toml, saves
its state, resumes, and ends with the LoRAs. `done` is written last, and atomically: its figures say what the run took. `failed`
holds the reason of the last try that failed.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from unbraid.common.atomic import atomic, read_toml
from unbraid.common.contents import FOLDER, mismatch
from unbraid.common.errors import UsageError
from unbraid.runs import folder
from unbraid.runs.absolute import absolute
from unbraid.runs.job import Job, prompts_of, record
from unbraid.runs.lease import PREFIX, AtWorkError, newest, this_machine

DONE, FAILED = "done", "failed"
LAST = 0.05  # the share of the steps, at the end, over which `loss` is the mean


def state(out: Path) -> str:
    """`done`, `failed`, `at work` (as of the last sign of life), `begun` or `waiting`."""
    names = set(os.listdir(out)) if out.is_dir() else set[str]()  # noqa: PTH208 (only names)
    if DONE in names:
        return "done"
    if any(name.startswith(PREFIX) for name in names) and (holder := newest(out)) and holder.at_work():
        return "at work"
    return "failed" if FAILED in names else "begun" if folder.RECORD in names else "waiting"


def folders(where: Path) -> list[Path]:
    """The job folders in a folder, sorted by name. UsageError if there are none."""
    with suppress(OSError):
        found = [Path(one.path) for one in os.scandir(where) if one.is_dir() and folder.is_job(Path(one.path))]
        if found:
            return sorted(found)
    what = mismatch(where, "a folder", (FOLDER,)) or "there are no job folders here"
    raise UsageError(what, where, "Give the folder of a grid.")


def is_done(out: Path) -> bool:
    return (out / DONE).exists()


def mark_done(out: Path) -> None:
    """Write `done`, unless it is there: the figures, and the job again, because JSON is read much faster than TOML.

    Call it while the folder is locked."""
    if not is_done(out):
        found = figures(out) | {"machine": this_machine().split()[0], "job": read_job(out)}
        with atomic(out / DONE) as part:
            part.write_text(json.dumps(found), "utf-8")
    (out / FAILED).unlink(missing_ok=True)


def mark_failed(out: Path, error: UsageError) -> None:
    """Write down in a job folder why a try failed; not if another worker has it, nor on a full disk, where it can't be."""
    if folder.is_job(out) and not isinstance(error, AtWorkError):
        with suppress(UsageError), atomic(out / FAILED) as part:
            part.write_text(f"{error}\n", "utf-8")


def read_failed(out: Path) -> str:
    """Why the last try failed; empty if there is none."""
    with suppress(OSError, ValueError):
        return (out / FAILED).read_text("utf-8").strip()
    return ""


def figures(out: Path) -> dict[str, int | float]:
    """What events.jsonl says of a run: `steps`; `loss`, the mean over the last twentieth; `seconds` of training; `memory`,
    the most bytes in use at the end of a step, where that is measured."""
    events = folder.read_events(out)
    if not events:
        return {"steps": 0}
    last = events[-max(1, round(LAST * len(events))) :]
    found: dict[str, int | float] = {"steps": len(events), "loss": sum(one["loss"] for one in last) / len(last)}
    found["seconds"] = round(sum(1 / one["rate"] for one in events if one.get("rate")), 3)
    return found | {"memory": max(one.get("memory") or 0 for one in events)}


def read_done(out: Path) -> dict[str, Any]:
    """The figures of a finished run, and its job; empty if it is not finished."""
    with suppress(OSError, ValueError):
        found = json.loads((out / DONE).read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def read_job(out: Path) -> dict[str, Any]:
    return read_toml(out / folder.JOB, "Delete the folder, and start the grid again.")


def write_job(job: Job) -> None:
    """Make `job.out` the job's folder by writing job.toml, with absolute paths, so that it can be run from anywhere.

    A job that has not begun may be written anew. UsageError if another one has, or a run that was not written down as a job."""
    wanted = record(job, prompts_of(job))
    if not folder.is_job(job.out):
        folder.claimable(job.out, wanted, resume=False)
    elif not (other := folder.difference(read_job(job.out), absolute(wanted))):
        return
    elif folder.begun(job.out):
        raise UsageError(f"the job in this folder is another one: {other}", job.out, "Choose another folder.")
    with atomic(job.out / folder.JOB) as part:
        part.write_text(folder.to_toml(absolute(wanted)), "utf-8")
