"""The common part of the training verbs on the command line: settings, progress, printed output."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import typer
from rich.progress import TextColumn
from typer.core import TyperCommand

from unbraid.cli.options import SHARED, Method
from unbraid.cli.progress import console, progress_bar
from unbraid.common.errors import UsageError

SHOWN = 10  # show the loss every so many steps on an accelerator: reading it waits for the device

UNDONE = 3  # exit status: training is done, but some picture could not be made
OWN_DEFAULTS = (
    "Their usual defaults are shown. A base can have its own, in the unbraid.toml of its folder: the embedded one, icons, has."
    " `unbraid explain METHOD --base BASE` prints those that count."
)
OTHERS = frozenset(  # arguments of the verbs that are not settings of a method
    (
        "method image images words subject style content prompt prompts class_prompt class_images from_ also loras roles single before after pairs beside blocks kind fine_tune out"
    ).split()
)


@dataclass(frozen=True)
class Todo:
    """What a training verb returns: a job to run. `main` runs it; `batch` runs it together with others.

    `numbered`: no folder was given. Then `main` takes the first default folder that is free, or with `resume` the last that is not."""

    job: Any
    resume: bool
    quiet: bool
    numbered: bool = False


class Verb(TyperCommand):
    """A training verb. Its help ends with its methods and their settings.

    These are listed only when the help is shown, because that imports torch."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from unbraid.methods import ENTRIES
        from unbraid.runs.settings import base_defaults, descriptions, open_settings

        embedded = base_defaults("icons")
        with formatter.section("Settings of the methods"):
            formatter.write_text(OWN_DEFAULTS)
        for entry in (one for one in ENTRIES if one.verb == self.name):
            about = descriptions(entry)
            with formatter.section(f"--method {entry.name}: {entry.title} ({entry.paper}). --set"):
                own = {name: f" On icons {value}." for name, value in embedded.get(entry.name, {}).items()}
                rows = [
                    (f"{name}={one.default}", about[name] + own.get(name, ""))
                    for name, one in open_settings(entry).items()
                ]
                formatter.write_dl(rows, col_max=34)


def training(app: typer.Typer, verb: str, method: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that makes a training verb of a function.

    The function takes the verb's own arguments, and as `given` the keyword arguments that all training verbs share. It
    returns the job, or None if there is nothing to train. `method`: the default method."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        own = {name: one for name, one in inspect.signature(function).parameters.items() if name != "given"}
        choice = inspect.Parameter("method", inspect.Parameter.KEYWORD_ONLY, default=method, annotation=Method)
        parameters = {**own, "method": choice, **{name: one for name, one in SHARED.items() if name not in own}}

        def command(**values: Any) -> Todo | None:
            resume, quiet, pairs = (values.pop(name) for name in ("resume", "quiet", "set_"))
            mine = {name: values.pop(name) for name in own}
            values["templates"] = parsed_templates(values.pop("template") or [])
            with loading("torch and diffusers", quiet):
                job = function(**mine, given=options(pairs, **values))
            return Todo(job, resume, quiet, not (values.get("out") or mine.get("out"))) if job else None

        ordered = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters.values()]
        command.__signature__ = inspect.Signature(ordered, return_annotation=Todo | None)  # type: ignore[attr-defined]
        command.__annotations__ = {name: one.annotation for name, one in parameters.items()} | {"return": Todo | None}
        command.__name__, command.__doc__ = verb, function.__doc__
        return app.command(name=verb, cls=Verb)(command)

    return add


def options(pairs: list[str] | None, **common: Any) -> dict[str, Any]:
    """Add the settings of the method from `--set` to the common options. UsageError if one has an option of its own."""
    from unbraid.runs.settings import parse_set  # imports the methods, and so torch, which the file tools do not need

    settings = parse_set(pairs or [])
    for key in settings:
        if key in common or key in OTHERS:
            raise UsageError(
                f"{key!r} is not a setting of the method", "--set", "It has an option of its own: see --help."
            )
    return {**common, **settings}


def parsed_templates(given: list[str]) -> dict[str, str]:
    """Role → template, from `--template ROLE=TEXT`."""
    found = {}
    for one in given:
        role, sign, text = one.partition("=")
        if not sign:
            raise UsageError(f"{one[:80]!r} has no =", "--template", "Write ROLE=TEXT.")
        found[role.strip()] = text
    return found


def loading(what: str, quiet: bool = False) -> Any:
    """Show what is being loaded, until the block ends."""
    return nullcontext() if quiet else console.status(f"loading {what}", spinner="line")


@contextmanager
def interruptible() -> Iterator[None]:
    """After Ctrl-C say that the same command goes on, without --resume, and end with status 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo("unbraid: interrupted; the same command goes on", err=True)
        raise typer.Exit(130) from error


def run_job(job: Any, resume: bool, quiet: bool, numbered: bool = False) -> int:
    """Train, and show the progress. Returns the exit status. `numbered`: see `Todo`."""
    from unbraid.common.progress import watched
    from unbraid.methods import METHODS
    from unbraid.runs import folder
    from unbraid.runs.after import next_steps
    from unbraid.runs.checks import check
    from unbraid.runs.memory import memory_line
    from unbraid.runs.run import run

    if numbered:
        job = replace(job, out=folder.last(job.out) if resume else folder.free(job.out))
    if not quiet and (job.base != "icons" or job.loading.vram != "max"):
        check(job, resume)
        console.print(memory_line(job), markup=False, highlight=False, soft_wrap=True)
    events, made, status = run(job, resume=resume), [], 0
    with loading(f"the base {job.base}", quiet) as spinner, ExitStack() as watching:
        if spinner:
            watching.enter_context(watched(lambda what, i, of: spinner.update(f"{what}: {i} of {of}")))
        first = next(events)
    if not quiet:
        console.print(
            f"{METHODS[job.method].known_as(job.settings)} on {job.base} → {job.out}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    with progress_bar(TextColumn("{task.fields[loss]}"), quiet=quiet) as bar:
        task = bar.add_task("training", total=first.total, loss="")
        for event in chain((first,), events):
            if event.step:
                shown = event.step.index % SHOWN == 0 or event.step.figures.device.type == "cpu"
                bar.update(task, completed=event.done)
                if shown:
                    bar.update(task, loss=f"loss {event.step.loss:.4f}")
            status = UNDONE if event.undone else status
            if event.note:
                bar.console.print(f"  {event.note}", markup=False, highlight=False, soft_wrap=True)
            if event.warning:
                bar.console.print(f"  warning: {event.warning}", markup=False, highlight=False, soft_wrap=True)
            if event.file:
                made.append(event.file)
                if not quiet and event.file.suffix != ".safetensors":
                    bar.console.print(f"  wrote {event.file}", markup=False, highlight=False, soft_wrap=True)
    loras = [file for file in made if file.suffix == ".safetensors"]
    for file in loras:
        print(file)
    if loras and not quiet:
        for line in next_steps(job):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return status
