"""Makes the typed Python API from the methods' entries. `python -m tools.options` writes both files; a test fails if they
are out of date.

`src/unbraid/runs/options.py` has the settings of every method and every verb. `src/unbraid/__init__.pyi` tells editors and
type checkers the signatures of the verbs, one for each method.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from unbraid.methods import ENTRIES
from unbraid.methods.entry import Entry
from unbraid.runs import api, break_make
from unbraid.runs.settings import about, open_settings

SOURCE = Path(__file__).parent.parent / "src" / "unbraid"
OPTIONS, STUB = SOURCE / "runs" / "options.py", SOURCE / "__init__.pyi"
VERBS = {"split": "split", "learn": "learn", "pair": "pair", "zip": "zip", "break": "break_module", "make": "make"}
JOBS = {verb: f"{verb}_job" for verb in VERBS}
HEAD = '''"""The settings of every method, as types. Made by `python -m tools.options` from the methods' entries; do not edit."""

from typing import Literal

from unbraid.runs.run_options import RunOptions
'''
STUB_HEAD = '''"""The verbs in Python. Made by `python -m tools.options` from the methods' entries; do not edit."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Unpack, overload

from unbraid.common.errors import UsageError as UsageError
from unbraid.images.given import Source
from unbraid.methods.b4m import Kind
from unbraid.runs import options as o
from unbraid.runs.batch import batch as batch
from unbraid.runs.cluster import Cluster as Cluster
from unbraid.runs.drawing import generate as generate
from unbraid.runs.grid import grid as grid
from unbraid.runs.job import Job, Progress
from unbraid.runs.push import push as push
from unbraid.runs.run_path import Run as Run
from unbraid.sampling.render import Use as Use

__version__: str
'''


def class_name(entry: Entry) -> str:
    """np-lora → NpLoraSettings."""
    return "".join(part.capitalize() for part in entry.name.split("-")) + "Settings"


def type_text(annotation: Any) -> str:
    """A type annotation as source code."""
    if get_origin(annotation) is Literal:
        return "Literal[" + ", ".join(f'"{one}"' for one in get_args(annotation)) + "]"
    return inspect.formatannotation(annotation)


def options() -> str:
    """The text of runs/options.py."""
    return "\n\n".join([HEAD, *map(_settings, ENTRIES), *map(_verb, VERBS)])


def _settings(entry: Entry) -> str:
    lines = [f"class {class_name(entry)}(RunOptions, total=False):"]
    lines.append(f'    """{entry.title} ({entry.paper}): {VERBS[entry.verb]}(…, method="{entry.name}")."""\n')
    for name, parameter in open_settings(entry).items():
        lines += [f"    {name}: {type_text(parameter.annotation)}", f'    """{about(entry, name)}"""']
    return "\n".join(lines) + "\n"


def _verb(verb: str) -> str:
    names = ", ".join(class_name(entry) for entry in of(verb))
    doc = (
        f'    """Settings of any method of `{VERBS[verb]}`; which of them a method has is checked when it is called."""'
    )
    return f"class {verb.capitalize()}Options({names}, total=False):\n{doc}\n"


def of(verb: str) -> list[Entry]:
    """The methods of a verb, the default first."""
    return [entry for entry in ENTRIES if entry.verb == verb]


def stub() -> str:
    """The text of __init__.pyi."""
    functions = [
        text
        for verb in VERBS
        for text in (
            *_overloads(verb, VERBS[verb], "Path" if verb == "make" else "Run"),
            *_overloads(verb, JOBS[verb], "Job"),
        )
    ]
    return "\n".join([STUB_HEAD, *functions])


def _overloads(verb: str, name: str, returns: str) -> Iterator[str]:
    """Source code of a verb's function, once for each of its methods."""
    methods = of(verb)
    module = break_make if hasattr(break_make, name) and name.startswith(("break", "make")) else api
    doc = (inspect.getdoc(getattr(module, name)) or "").split("\n")[0] + (
        " Returns the run folder." if returns == "Run" else ""
    )
    for entry in methods:
        arguments = _arguments(verb)
        default = f' = "{entry.name}"' if entry is methods[0] else ""
        arguments.append(f'method: Literal["{entry.name}"]{default}')
        if returns == "Run":
            arguments.append("progress: Callable[[Progress], None] | None = None")
        arguments.append(f"**options: Unpack[o.{class_name(entry)}]")
        head = "@overload\n" if len(methods) > 1 else ""
        documented = entry is methods[0] and name == VERBS[verb]  # once is enough: the file is long
        body = f'\n    """{doc}"""\n' if documented else " ..."
        yield f"{head}def {name}({', '.join(arguments)}) -> {returns}:{body}"


def _arguments(verb: str) -> list[str]:
    """The arguments that all methods of a verb share, as source code, from the definition of `VERB_job`."""
    path = Path(inspect.getfile(break_make if verb in ("break", "make") else api))
    (node,) = (one for one in ast.parse(path.read_text()).body if getattr(one, "name", "") == JOBS[verb])
    assert isinstance(node, ast.FunctionDef)
    found = [ast.unparse(one) for one in node.args.args] + ["*"]
    for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if one.arg != "method":
            found.append(ast.unparse(one) + (f" = {ast.unparse(default)}" if default else ""))
    return found


if __name__ == "__main__":
    import subprocess
    import sys

    for path, text in ((OPTIONS, options()), (STUB, stub())):
        path.write_text(text)
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(OPTIONS), str(STUB)], check=True)
