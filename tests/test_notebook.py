"""examples/unbraid.ipynb runs as far as the embedded base goes, with few steps."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unbraid.files.lora_file import read

NOTEBOOK = Path(__file__).parent.parent / "examples" / "unbraid.ipynb"
FEW = {"UNBRAID_NOTEBOOK_STEPS": "3", "UNBRAID_NOTEBOOK_DRAWING_STEPS": "2"}


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def source(name: str) -> str:
    (found,) = (cell for cell in cells() if cell["id"] == name)
    return "".join(found["source"])


def test_it_is_saved_without_outputs_and_is_plain_python() -> None:
    book = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in book["cells"]]
    assert len(set(names)) == len(names)
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            ast.parse("".join(cell["source"]))
    assert cells()[names.index("parameters")]["metadata"]["tags"] == ["parameters"]  # as papermill wants them


def displayed(code: str, names: dict[str, Any]) -> Any:
    """Execute a cell as a notebook does. Returns the value of its last line, which is displayed; None if that is no expression."""
    tree, value = ast.parse(code), None
    if tree.body and isinstance(last := tree.body[-1], ast.Expr):
        tree.body.pop()
        value = compile(ast.Expression(last.value), "cell", "eval")
    exec(compile(tree, "cell", "exec"), names)
    return eval(value, names) if value else None


@pytest.mark.slow
def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, so that it runs where no notebook is installed."""
    monkeypatch.chdir(tmp_path)
    for name, value in FEW.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = {cell["id"]: displayed("".join(cell["source"]), names) for cell in cells() if cell["cell_type"] == "code"}
    assert shown["split"]._repr_png_(), "a run is shown as its sheet"
    assert all(isinstance(shown[cell], Image.Image) for cell in ("input", "content", "recombine"))
    for run in (names["run"], names["other"]):
        assert all(read(run / f"{kind}.safetensors").modules for kind in ("content", "style"))
    assert [unit.row for unit in names["units"]] == ["base alone", "UnZipLoRA"]
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith(("base alone", "UnZipLoRA"))]) == 6


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("nbclient") and find_spec("ipykernel")), reason="nbclient and ipykernel are not installed"
)
def test_it_runs_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat  # type: ignore[import-not-found]
    from nbclient import NotebookClient  # type: ignore[import-not-found]

    for name, value in FEW.items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (split,) = (cell for cell in book.cells if cell["id"] == "split")
    assert any("image/png" in output.get("data", {}) for output in split["outputs"])


def test_the_part_for_a_card_names_real_settings() -> None:
    """It is not executed: its calls are checked against the verbs."""
    import unbraid

    options: list[str] = []
    for cell in ("sdxl", "sdxl-draw"):
        calls = [node for node in ast.walk(ast.parse(source(cell))) if isinstance(node, ast.Call)]
        for call in calls:
            if ast.unparse(call.func) == "unbraid.split":
                given = {
                    one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg not in ("base", "progress")
                }
                picture = Path(unbraid.__file__).parent / "bases" / "icons" / "example.png"
                job = unbraid.split_job(picture, **given)  # type: ignore[arg-type]
                options += [job.loading.vram, str(job.settings["rank"])]
            if ast.unparse(call.func) == "unbraid.generate":
                known = unbraid.generate.__annotations__
                assert all(one.arg in known for one in call.keywords)
    assert options == ["16", "16"]
