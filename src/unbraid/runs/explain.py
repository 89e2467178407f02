"""A description of a method as text. It is printed from the method's own branches, which are plain data."""

from collections.abc import Iterator

from unbraid.bases.families import BLOCKS
from unbraid.common.errors import UsageError
from unbraid.core.lora import ALL, WHOLE, Active, Branch
from unbraid.core.recipe import Recipe
from unbraid.methods import METHODS
from unbraid.methods.entry import Output
from unbraid.runs.settings import resolve, schema


def explain(method: str, base: str = "icons") -> str:
    """Paper, steps, prompts, output files and settings of a method, with the settings' defaults on `base`."""
    if methods := [entry.name for entry in METHODS.values() if entry.verb == method and method not in METHODS]:
        raise UsageError(f"{method} is a command", "explain", f"Its methods: {', '.join(methods)}.")
    settings = resolve(method, base, None, {})
    entry = METHODS[method]
    lines = [f"{method}: unbraid {entry.verb} ({entry.paper})", ""]
    for number, recipe in enumerate(entry.make(BLOCKS["sdxl"], **settings), 1):
        lines += [f"recipe {number}: {recipe.steps} steps{_shared(recipe)}", *_steps(recipe)]
    lines += ["", "prompts:", *(f"  {role}: {text}" for role, text in entry.prompts.items())]
    lines += [] if entry.prompts else ["  each LoRA's own"]
    lines += ["", "files:", *(_file(stem, output) for stem, output in entry.outputs(settings).items())]
    lines += ["", f"settings on {base} (--set name=value):"]
    for name, parameter in schema(entry).items():
        usual = f"  (elsewhere {parameter.default!r})" if settings[name] != parameter.default else ""
        lines.append(f"  {name} = {settings[name]!r}{usual}")
    about = (entry.make.__doc__ or "").strip().splitlines()[1:]
    return "\n".join([*lines, *(line.removeprefix("    ") for line in about)])


def _shared(recipe: Recipe) -> str:
    return f", shared {', '.join(sorted(recipe.passes.shared))}" if recipe.passes.shared else ""


def _steps(recipe: Recipe) -> Iterator[str]:
    """The branches of the first step, and of every later step where they change."""
    last = None
    for step in range(recipe.steps):
        branches = recipe.branches(step)
        if branches != last:
            yield f"  from step {step}:"
            yield from (f"    {_branch(branch)}" for branch in branches)
        last = branches


def _file(stem: str, output: Output) -> str:
    return f"  {stem}.safetensors: {' + '.join(output.adapters)}, prompt {output.prompt}"


def _branch(branch: Branch) -> str:
    adapters = " + ".join(map(_active, branch.active)) or "base alone"
    teacher = f", towards [{_branch(branch.teacher)}]" if branch.teacher else ""
    weight = f" × {branch.weight:g}" if branch.weight != 1 else ""
    loss = ", x0 loss" if branch.loss == "x0" else ""
    noise = f", noise offset {branch.noise.offset:g}" if branch.noise.offset else ""
    noise += ", from {:g} to {:g} of the way".format(*branch.noise.part) if branch.noise.part != WHOLE else ""
    return f"{branch.image!r} under {branch.prompt!r}: {adapters}{weight}{loss}{noise}{teacher}"


def _active(active: Active) -> str:
    notes = [f"reads {active.prompt!r}"] if active.prompt else []
    notes += [f"scale {active.scale:g}"] if active.scale != 1 else []
    notes += [] if active.merger else ["without mergers"]
    notes += [] if active.trains == ALL else ["trains " + (", ".join(sorted(active.trains)) or "nothing")]
    return active.adapter + (f" ({'; '.join(notes)})" if notes else "")
