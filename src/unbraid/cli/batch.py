"""`unbraid batch`: many runs in one process, from a file with the command-line options of each run."""

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError, create_model
from rich.progress import TextColumn

from unbraid.cli.options import Device, Quiet, Resume
from unbraid.cli.progress import progress_bar
from unbraid.cli.run import UNDONE
from unbraid.cli.train import app as training_commands
from unbraid.common.atomic import read_toml
from unbraid.common.errors import UsageError, suggestion

app = typer.Typer()
FORM = 'One table per run: [[run]], verb = "split", …'
NOT_THERE = ("resume", "quiet")  # options of the whole batch, not of a single run


@app.command()
def batch(
    files: Annotated[list[Path], typer.Argument(help="TOML with a [[run]] table per run; or run.toml files.")],
    at_once: Annotated[
        int | None, typer.Option(help="Runs in one forward pass; without, as many as there is memory for, up to 8.")
    ] = None,
    processes: Annotated[
        int,
        typer.Option(help="Processes side by side, each with its share of the runs; several cards are dealt in turn."),
    ] = 1,
    device: Device = "",
    resume: Resume = False,
    quiet: Quiet = False,
) -> int:
    """Many runs in one process, each in its own folder.

    The runs are independent. Those on the same base share their passes through it."""
    from unbraid.runs.batch import run_many
    from unbraid.runs.spread import run_spread

    jobs = [job for file in files for job in read(file)]
    one = processes == 1
    events = run_many(jobs, at_once, resume, device) if one else run_spread(jobs, processes, at_once, resume, device)
    failed, undone = _watch(jobs, events, quiet)
    if failed:
        fix = (
            "The others are done; --resume goes on with what is not." if failed < len(jobs) else "See the lines above."
        )
        raise UsageError(f"{failed} of {len(jobs)} runs failed", ", ".join(map(str, files)), fix)
    return UNDONE if undone else 0


def read(file: Path) -> list[Any]:
    """The jobs of a batch file, or the one job of a run.toml. UsageError if the file is neither."""
    from unbraid.runs.batch import recorded  # imports torch, which the file tools do not need

    table = read_toml(file, f"Give a run.toml, or a file of runs. {FORM}")
    if isinstance(table.get("method"), str) and "run" not in table:
        return [recorded(file)]
    runs = table.pop("run", None)
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise UsageError("there are no runs in it", file, FORM)
    for key in table.keys() - set().union(*(_names(verb) for verb in _verbs().values())):
        raise UsageError(f"no verb has {key!r}", file, "Settings of a method stand under `set`.")
    return [job_of({**table, **run}, run.keys(), f"{file}, run {i + 1}") for i, run in enumerate(runs)]


def job_of(given: Mapping[str, Any], own: Iterable[str], where: str) -> Any:
    """The job of a run's table, the same as from its command line.

    `own`: the keys of the run itself. Other keys, given once for all runs, are ignored by verbs without the option."""
    verb = _verbs().get(str(given.get("verb")))
    if verb is None:
        fix = f"There are: {', '.join(_verbs())}."
        raise UsageError(f"there is no training verb {given.get('verb')!r}", where, fix)
    known = _names(verb)
    for key in set(own) - known.keys() - {"verb"}:
        raise UsageError(f"{given['verb']} has no {key!r}", where, suggestion(key, known))
    try:
        todo = verb(**_checked(verb, {known[key]: value for key, value in given.items() if key in known}, where))
    except UsageError as error:
        raise UsageError(error.what, f"{where}: {error.where}", error.fix) from error
    if todo is None:
        raise UsageError("there is nothing to train", where, "Give fine_tune, or leave this run out.")
    return todo.job


def _verbs() -> dict[str, Callable[..., Any]]:
    """The training verbs: name on the command line → function."""
    found = {
        one.name or one.callback.__name__: one.callback for one in training_commands.registered_commands if one.callback
    }
    return {name: verb for name, verb in found.items() if get_type_hints(verb)["return"] is not NoneType}


def _names(verb: Callable[..., Any]) -> dict[str, str]:
    """Option name in the file → parameter of the verb."""
    return {name.rstrip("_"): name for name in inspect.signature(verb).parameters if name not in NOT_THERE}


def _checked(verb: Callable[..., Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert the values to the types of the verb's parameters. UsageError for one that does not fit.

    A single value stands for a list of one, too. The table `set` becomes NAME=VALUE pairs, as on the command line."""
    hints, parameters, values = get_type_hints(verb), inspect.signature(verb).parameters, dict(given)
    if isinstance(table := values.get("set_"), dict):
        values["set_"] = [f"{name}={json.dumps(value)}" for name, value in table.items()]
    for name, value in values.items():
        if any(get_origin(hint) is list for hint in (hints[name], *get_args(hints[name]))) and not isinstance(
            value, list
        ):
            values[name] = [value]
    fields: dict[str, Any] = {
        name: (hints[name], ... if one.default is inspect.Parameter.empty else one.default)
        for name, one in parameters.items()
    }
    try:
        return {name: value for name, value in create_model("run", **fields)(**values) if name in fields}
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{str(first['loc'][0]).rstrip('_')}: {first['msg']}",
            where,
            "The names and values are those of the command line.",
        ) from error


def _watch(jobs: Sequence[Any], events: Iterable[tuple[int, Any]], quiet: bool) -> tuple[int, bool]:
    """Show the progress, and print the LoRA files.

    Returns the number of failed runs, and whether some picture could not be made."""
    failed, undone, made = 0, False, list[Path]()
    with progress_bar(TextColumn("{task.fields[loss]}"), quiet=quiet) as bar:
        whole = bar.add_task("runs", total=len(jobs), loss="")
        tasks = [bar.add_task(str(job.out), total=None, visible=False, loss="") for job in jobs]
        for which, event in events:
            if isinstance(event, UsageError):
                failed += 1
                bar.update(tasks[which], visible=False)
                print(f"unbraid: {jobs[which].out}: {event}", file=sys.stderr)
                continue
            undone |= event.undone
            going = event.done < event.total
            bar.update(tasks[which], total=event.total, completed=event.done, visible=going)
            if event.step:
                bar.update(tasks[which], loss=f"loss {event.step.loss:.4f}")
            bar.update(whole, completed=failed + sum(task.finished for task in bar.tasks[1:]))
            if event.warning:
                bar.console.print(
                    f"  {jobs[which].out}: {event.warning}", markup=False, highlight=False, soft_wrap=True
                )
            made += [event.file] if event.file and event.file.suffix == ".safetensors" else []
    for file in made:
        print(file)
    return failed, undone
