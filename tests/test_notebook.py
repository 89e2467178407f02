"""examples/unbraid.ipynb runs as far as the embedded base goes, with few steps."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from unbraid.files.lora_file import read

NOTEBOOK = Path(__file__).parent.parent / "examples" / "unbraid.ipynb"
FEW = {"UNBRAID_NOTEBOOK_STEPS": "3", "UNBRAID_NOTEBOOK_DRAWING_STEPS": "2", "OMP_NUM_THREADS": "1"}
FASTER = "from unbraid.runs import pace\npace.PREVIEW_STEPS = pace.SHEET_STEPS = 1"


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


@pytest.mark.slow
def test_it_runs_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in FEW.items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    book.cells.insert(0, nbformat.v4.new_code_cell(FASTER))
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell["id"]: cell["outputs"] for cell in book.cells if cell["cell_type"] == "code"}
    for cell in ("input", "split", "content", "recombine"):
        assert any("image/png" in one.get("data", {}) for one in outputs[cell]), f"{cell} shows a picture"
    files = [*(tmp_path / "runs").glob("*/*.safetensors")]
    assert len(files) == 4 and all(read(file).modules for file in files)
    printed = "".join(one["text"] for one in outputs["scores"]).splitlines()
    assert [line.partition("  ")[0] for line in printed] == ["base alone"] * 3 + ["UnZipLoRA"] * 3


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
