"""What misled two new users, each once: every row of their reports is a test here or in the file of its subject."""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from test_run import called_in_process, cli_in_process
from typer.testing import CliRunner

from unbraid.cli.main import app
from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.files.lora_file import read, write
from unbraid.images.sheets import contact_sheet
from unbraid.methods import METHODS
from unbraid.runs import folder
from unbraid.runs.api import learn_job, split_job, zip_job
from unbraid.runs.explain import explain
from unbraid.runs.job import prompts_of
from unbraid.runs.run import run


def one_line(arguments: list[str], *words: str) -> None:
    code, text = cli_in_process(arguments)
    assert code == 1 and len(text.splitlines()) == 1 and all(word in text for word in words), text


def lora_file(path: Path) -> Path:
    name = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    write(path, {name: Lora(torch.ones(2, 2048), torch.ones(640, 2), 2.0)}, family="sdxl")
    return path


def test_split_takes_one_picture(picture: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(picture.read_bytes())
    with pytest.raises(UsageError, match=r"a folder of 2 pictures, where one picture is split.*unbraid learn"):
        split_job(tmp_path, subject="cat", style="ink")
    (tmp_path / "b.png").unlink()
    assert split_job(tmp_path, subject="cat", style="ink").data.images["image"] == (tmp_path / "a.png",)


def test_pictures_without_a_model_to_score_them(tmp_path: Path) -> None:
    one_line(["bench", "--images", str(tmp_path)], "no model to score", "--clip, --dino, --csd, --lpips")


def test_pictures_on_a_sheet_keep_their_size() -> None:
    def side(*pixels: int, cell: int = 0) -> int:
        rows = [("row", [("x", Image.new("RGB", (one, one))) for one in pixels])]
        return (contact_sheet(rows, cell).width - 6) // len(pixels) - 6

    assert side(64, 64, 4000) == 128, "an input picture may be of any size"
    assert side(256, 256, 300) == 256 and side(1024) == 512 and side(1024, cell=192) == 192


def test_a_title_is_nearer_to_its_own_row_than_to_the_row_above() -> None:
    rows = [("Title", [("gqyp", Image.new("RGB", (128, 128), "red"))])] * 2
    lines = np.asarray(contact_sheet(rows).convert("L")).min(1) < 255
    heights = [(ink, len([*some])) for ink, some in groupby(lines)]
    picture = max(i for i, (ink, height) in enumerate(heights[:-3]) if ink and height == 128 and i < len(heights) // 2)
    below, _, between, _, above = (height for _, height in heights[picture + 1 : picture + 6])
    assert between > 15 and between > 2 * max(below, above)


def test_options_are_checked_before_folders(picture: Path, v_base: Path, tmp_path: Path) -> None:
    options = {"base": str(v_base), "rank": 2, "steps": 1, "previews": 0, "out": tmp_path / "r"}
    next(run(learn_job(picture, prompt="a cat", **options), device="cpu"))  # type: ignore[arg-type]
    again = ["learn", str(picture), "--prompt=a cat", f"--out={tmp_path / 'r'}"]
    one_line([*again, "--base=nowhere"], "no such base")
    one_line([*again, f"--base={v_base}", "--vram=10"], "no preset '10'")
    one_line([*again, f"--base={v_base}", "--set=rank=2", "--set=steps=1"], "holds a run already")


def test_default_folders_are_numbered(
    picture: Path, v_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["learn", str(picture), "--prompt=a cat", f"--base={v_base}", "--previews=0", "--quiet"]
    command += ["--set=rank=2", "--set=steps=1"]
    for name in ("cat-dreambooth", "cat-dreambooth-2"):
        assert cli_in_process(command)[0] == 0 and (tmp_path / "runs" / name / "lora.safetensors").exists()
    before = sorted(Path("runs").rglob("*"))
    code, text = cli_in_process([*command, "--resume"])
    assert code == 0 and "done already" in text and sorted(Path("runs").rglob("*")) == before
    assert folder.last(Path("runs/cat-dreambooth")).name == "cat-dreambooth-2"
    assert folder.free(Path("runs/none")) == folder.last(Path("runs/none")) == Path("runs/none")


def test_a_run_in_place_of_its_file_is_answered_with_the_files(tmp_path: Path) -> None:
    fox = tmp_path / "fox"
    for name in ("content", "style"):
        lora_file(fox / f"{name}.safetensors")
    (fox / "run.toml").touch()
    with pytest.raises(UsageError, match=r"is a run, not a file. Give a file in it: content.safetensors or style.safe"):
        read(fox)
    with pytest.raises(UsageError, match=r"style.safetensors: 'abc' is not a strength. Give a number"):
        read(fox / "style.safetensors:abc")
    with pytest.raises(UsageError, match="there is no such file"):
        read(fox / "none.safetensors:abc")


def test_a_lora_without_a_prompt_is_answered_with_the_options(tmp_path: Path) -> None:
    loras = [lora_file(tmp_path / f"{name}.safetensors") for name in "ab"]
    with pytest.raises(UsageError, match=r"records no prompt of its own.*--content-prompt or --style-prompt"):
        zip_job(*loras)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = str(tmp_path / "x.png")
    one_line(
        ["generate", "--prompt=a cat", f"--out={out}", "--base=someone/some-base"], "no network", "not in the cache"
    )


def test_explain_of_a_command_gives_its_methods() -> None:
    with pytest.raises(UsageError, match=r"split is a command. Its methods: unziplora, blora"):
        explain("split")
    assert explain("make"), "a method of that name comes first"


def test_rows_of_the_benchmark_by_name() -> None:
    from unbraid.bench.registry import chosen

    assert chosen(("combine",), ("ziplora",)) == chosen(("combine",), ("ZipLoRA",)) != []
    code, printed, _ = called_in_process(["bench", "--only", "list"])
    assert code == 0 and {"ZipRank", "UnZipLoRA, official"} < set(printed.splitlines())


def test_quiet_prints_the_loras_once(picture: Path, v_base: Path, tmp_path: Path) -> None:
    command = ["learn", str(picture), "--prompt=a cat", f"--base={v_base}", "--previews=1", "--quiet", f"--out={tmp_path / 'r'}"]  # fmt: skip
    code, printed, errors = called_in_process([*command, "--set=rank=2", "--set=steps=1"])
    assert (code, printed, errors) == (0, f"{tmp_path / 'r' / 'lora.safetensors'}\n", "")


def test_zipping_by_rank_goes_by_its_name() -> None:
    from unbraid.runs.settings import resolve

    names = {one: METHODS["ziplora"].known_as(resolve("ziplora", "icons", None, {"granularity": one})) for one in ("rank", "column")}  # fmt: skip
    assert names == {"rank": "ziprank", "column": "ziplora"} and METHODS["blora"].known_as({}) == "blora"


def test_summaries_are_whole() -> None:
    text = CliRunner().invoke(app, ["--help"], terminal_width=80).output.partition("Commands:")[2]
    group = typer.main.get_command(app)
    assert "..." not in text and all(name in text for name in group.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("subject", "style", "base", "wanted"),
    [
        ("owl", "ink", "base", "an owl in ink style"),
        ("unicorn", "ink", "base", "a unicorn in ink style"),
        ("owl", "ink", "icons", "a owl in ink style"),
    ],
)
def test_a_or_an(subject: str, style: str, base: str, wanted: str, v_base: Path, picture: Path, tmp_path: Path) -> None:
    """The captions of the embedded base have `a` before vowels, too."""
    name = str(v_base) if base == "base" else base
    job = split_job(picture, subject=subject, style=style, base=name, out=tmp_path)
    assert prompts_of(job)["style"] == wanted and prompts_of(job)["content"] == f"a sks {subject}"


@pytest.mark.slow
def test_the_trigger_of_a_style_is_the_style(picture: Path, v_base: Path, tmp_path: Path) -> None:
    job = split_job(picture, subject="cat", style="ink", base=str(v_base), out=tmp_path, rank=2, steps=4, previews=0)
    list(run(job, device="cpu"))
    found = {role: read(tmp_path / f"{role}.safetensors").metadata for role in ("content", "style")}
    assert found["style"]["modelspec.trigger_phrase"] == "in ink style"
    assert found["style"]["unbraid.prompt"] == "a cat in ink style"
    assert found["content"]["modelspec.trigger_phrase"] == "a sks cat"
