"""Rooms (sub-packages) import in one direction only; rooms of one floor do not import each other; no modules import in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "unbraid"
FLOORS = ({"common"}, {"core", "images"}, {"files", "methods"}, {"bases"}, {"sampling"}, {"runs"}, {"bench", "cli"})
ALLOWED = {("cli", "bench")}  # the command line runs the benchmark
LIBRARIES = {"diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL", "numpy", "typer", "rich"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_rooms_import_one_way() -> None:
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    assert floor.keys() == {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    for path in SOURCE.glob("*/**/*.py"):
        room = path.relative_to(SOURCE).parts[0]
        for name in imports(path):
            other = name.split(".")[1] if name.startswith("unbraid.") else room
            assert other == room or floor[other] < floor[room] or (room, other) in ALLOWED, f"{path}: {name}"
            assert room != "core" or name.split(".")[0] not in LIBRARIES, f"{path}: {name}: core is torch alone"


def test_no_circles() -> None:
    names = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    known = {name: {m for one in imports(path) for m in (one, one.rpartition(".")[0])} for name, path in names.items()}
    TopologicalSorter({name: some & names.keys() - {name} for name, some in known.items()}).prepare()


def test_no_circles_of_folders_in_the_benchmark() -> None:
    """`truth` imports no other folder of the benchmark, and no two folders (the top one included) import each other."""
    top = SOURCE / "bench"
    folders = {path.name for path in top.iterdir() if path.is_dir() and path.name != "__pycache__"}
    graph: dict[str, set[str]] = {name: set() for name in (*folders, "")}
    for path in top.rglob("*.py"):
        mine = path.relative_to(top).parts[0] if path.parent != top else ""
        for name in imports(path):
            if name.startswith("unbraid.bench."):
                other = name.split(".")[2]
                graph[mine].add(other if other in folders else "")
    graph = {name: others - {name} for name, others in graph.items()}
    assert not graph["truth"]
    TopologicalSorter(graph).prepare()
