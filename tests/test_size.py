"""Files, functions and dataclasses stay small. The limits hold in all of src/unbraid."""

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

SOURCE = Path(__file__).parent.parent / "src" / "unbraid"
FILE_LINES, FUNCTION_LINES, PARAMETERS, FIELDS = 250, 60, 8, 9
GENERATED = {
    "runs/options.py"
}  # tools/options.py writes it, and nobody edits it: two lines for every setting of every method
MEDIAN_FILE_LINES, MOST_FUNCTION_LINES = 150, 30  # the median file; nine functions of ten


def name_of(node: ast.expr) -> str:
    """`dataclass` for `@dataclass`, `@dataclass(frozen=True)` and `@dataclasses.dataclass`."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_verb(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Verbs of the command line and of the Python API, and methods, whose keyword arguments are their settings, have a parameter per
    option, so the parameter limit does not apply."""
    room = path.relative_to(SOURCE).as_posix()
    if room in ("runs/api.py", "runs/break_make.py", "runs/drawing.py"):
        return not node.name.startswith("_")
    if room.startswith("methods/"):
        return ast.unparse(node.returns or ast.Constant(None)) == "tuple[Recipe, ...]"
    decorators = {name_of(one) for one in node.decorator_list}
    return room.startswith("cli/") and bool(decorators & {"command", "training"} or node.name == "shared")


def excesses(path: Path, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, what is too large) for each excess in a file."""
    file = path.relative_to(SOURCE).as_posix()
    if (lines := len(path.read_text().splitlines())) > FILE_LINES and file not in GENERATED:
        yield file, f"{lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (lines := length(node)) > FUNCTION_LINES:
                yield f"{file}:{node.name}", f"{lines} lines"
            a = node.args
            parameters = [one for one in (*a.posonlyargs, *a.args, *a.kwonlyargs) if one.arg not in ("self", "cls")]
            if len(parameters) > PARAMETERS and not is_verb(path, node):
                yield f"{file}:{node.name}", f"{len(parameters)} parameters"
        elif isinstance(node, ast.ClassDef) and any(name_of(one) == "dataclass" for one in node.decorator_list):
            fields = sum(isinstance(one, ast.AnnAssign) for one in node.body)
            if fields > FIELDS:
                yield f"{file}:{node.name}", f"{fields} fields"


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


TREES = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def test_sizes() -> None:
    found = [f"{name}: {what}" for path, tree in TREES.items() for name, what in excesses(path, tree)]
    assert not found, "\n".join(found)


def test_most_are_small() -> None:
    assert median(len(path.read_text().splitlines()) for path in TREES) <= MEDIAN_FILE_LINES
    functions = [
        length(node)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert quantiles(functions, n=10)[-1] <= MOST_FUNCTION_LINES
