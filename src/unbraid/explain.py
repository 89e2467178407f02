"""What a method does, as text: its branches are data, so they can be printed."""

from unbraid.base import BLOCKS
from unbraid.errors import UsageError
from unbraid.lora import ALL, Active, Branch
from unbraid.methods import METHODS
from unbraid.settings import schema


def explain(method: str) -> str:
    """Paper, steps, prompts, files and settings of a method."""
    if method not in METHODS:
        raise UsageError(f"there is no method {method!r}", "explain", f"There are: {', '.join(METHODS)}.")
    entry = METHODS[method]
    lines = [f"{method}: unbraid {entry.verb} (arXiv {entry.paper})", ""]
    for number, recipe in enumerate(entry.make(BLOCKS["sdxl"]), 1):
        lines.append(
            f"recipe {number}: {recipe.steps} steps"
            + (f", shared {', '.join(sorted(recipe.shared))}" if recipe.shared else "")
        )
        last = None
        for step in range(recipe.steps):
            branches = recipe.branches(step)
            if branches != last:
                lines += [f"  from step {step}:", *(f"    {_branch(branch)}" for branch in branches)]
            last = branches
    lines += ["", "prompts:", *(f"  {role}: {text}" for role, text in entry.prompts.items())]
    outputs = entry.outputs({name: p.default for name, p in schema(entry).items()})
    lines += [
        "",
        "files:",
        *(f"  {stem}.safetensors: {one.adapter}, prompt {one.prompt}" for stem, one in outputs.items()),
    ]
    lines += ["", "settings (--set name=value):"]
    lines += [f"  {name} = {p.default!r}" for name, p in schema(entry).items()]
    about = (entry.make.__doc__ or "").strip().splitlines()[1:]
    return "\n".join([*lines, *(line.removeprefix("    ") for line in about)])


def _branch(branch: Branch) -> str:
    adapters = " + ".join(map(_active, branch.active)) or "base alone"
    teacher = f", towards [{_branch(branch.teacher)}]" if branch.teacher else ""
    weight = f" × {branch.weight:g}" if branch.weight != 1 else ""
    return f"{branch.image!r} under {branch.prompt!r}: {adapters}{weight}{teacher}"


def _active(active: Active) -> str:
    notes = [f"reads {active.prompt!r}"] if active.prompt else []
    notes += [f"scale {active.scale:g}"] if active.scale != 1 else []
    notes += [] if active.trains == ALL else ["trains " + (", ".join(sorted(active.trains)) or "nothing")]
    return active.adapter + (f" ({'; '.join(notes)})" if notes else "")
