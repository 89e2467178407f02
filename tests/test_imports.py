"""Imports go one way: rooms (sub-packages) import from lower floors, and there is no circle of files or of folders."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

TOP = Path(__file__).parent.parent / "src" / "unbraid"
FLOORS = "common | core images | files methods | bases | sampling | runs | bench studio | cli".split(
    "|"
)  # the lowest first
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
CORE = {"torch", "jaxtyping", "psutil", "unbraid"}  # what core may import beside the standard library


def imports(path: Path) -> set[str]:
    """The names that a file imports: a for `import a`, a.b for `from a import b`."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom))
    return {f"{getattr(node, 'module', '')}.{alias.name}".strip(".") for node in nodes for alias in node.names}


NAMES = {path: imports(path) for path in TOP.rglob("*.py")}
MODULES = {".".join(path.relative_to(TOP.parent).with_suffix("").parts): path for path in NAMES}
MODULES |= {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
FOUND = {(path, one) for path, names in NAMES.items() for name in names for one in (name, name.rpartition(".")[0])}
EDGES = {(path, MODULES[name]) for path, name in FOUND if name in MODULES}


def test_rooms_import_from_lower_floors_and_core_is_torch_alone() -> None:
    assert FLOOR.keys() == {path.parent.name for path in TOP.glob("*/__init__.py")}
    for path, other in EDGES:
        room, below = (one.relative_to(TOP).parts[0] for one in (path, other))
        assert room in (below, "__init__.py", "__main__.py") or FLOOR[below] < FLOOR[room], f"{path} imports {other}"
    assert {n.split(".")[0] for path in TOP.glob("core/*.py") for n in NAMES[path]} - sys.stdlib_module_names <= CORE


def test_no_circles_of_files_or_folders() -> None:
    for edges in (EDGES, {(path.parent, other.parent) for path, other in EDGES}):
        graph = {path: {other for one, other in edges if one == path != other} for path, _ in edges}
        TopologicalSorter(graph).prepare()
