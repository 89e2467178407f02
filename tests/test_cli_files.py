"""The file commands, called through the command line."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from unbraid.cli.files import app, source_of
from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta
from unbraid.files.lora_file import read, write

NAMES = ("unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "unet.up_blocks.0.attentions.1.proj_in")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for n, name in enumerate("ab"):
        rng = torch.Generator().manual_seed(n)
        modules = {
            m: Lora(torch.randn(4, 2048 if "to_k" in m else 1280, generator=rng), torch.randn(8, 4, generator=rng), 2.0)
            for m in NAMES
        }
        write(tmp_path / f"{name}.safetensors", modules, family="sdxl", dtype=torch.float32)
    return tmp_path


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, UsageError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_merge_is_stacking(files: Path) -> None:
    a, b, out = (files / f"{name}.safetensors" for name in ("a", "b", "out"))
    printed = call("merge", f"{a}:0.7", f"{b}:-0.4:OUT01=0.5", "--out", out)
    assert "2 modules for sdxl, rank 8" in printed
    first, second, made = read(a).modules, read(b).modules, read(out)
    for name, weight in zip(NAMES, (-0.4, -0.2), strict=True):
        want = 0.7 * delta(first[name]) + weight * delta(second[name])
        assert torch.allclose(delta(made.modules[name]), want, atol=1e-5)
    assert made.metadata["modelspec.merged_from"].count(",") == 1
    assert "kept" in call("merge", a, b, "--out", out, "--method", "ties", "--density", "0.3", "--rank", 3)
    assert "kept" in call("resize", a, out, "--energy", 0.5)


def test_edit_convert_and_metadata(files: Path) -> None:
    a, out = files / "a.safetensors", files / "out.safetensors"
    Image.new("RGB", (600, 300), "teal").save(files / "x.png")
    call(
        "edit",
        a,
        out,
        "--block",
        "OUT00=0",
        "--trigger",
        "in ink",
        "--title",
        "Ink",
        "--thumbnail",
        files / "x.png",
        "--sidecar",
    )
    assert set(read(out).modules) == {NAMES[1]}
    with safe_open(out, "np") as handle:
        assert handle.metadata()["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    with Image.open(files / "out.jpg") as small:
        assert (files / "out.json").exists() and small.size == (256, 128)
    call("convert", a, out, "--to", "diffusers", "--dtype", "fp16")
    assert read(out).modules[NAMES[0]].up.dtype == torch.float16


def test_doctor_and_inspect_speak(files: Path) -> None:
    a, b = files / "a.safetensors", files / "b.safetensors"
    call("convert", a, files / "d.safetensors", "--to", "diffusers")
    printed = call("doctor", files / "d.safetensors", "--for", "a1111")
    assert "A1111: loads 0 of 2" in printed and "unbraid convert" in printed
    assert "ComfyUI: loads 2 of 2 modules" in call("doctor", a)
    printed = call("inspect", a, b, "--plot", files / "x.png")
    assert "OUT01" in printed and "overlap" in printed and (files / "x.png").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "{a}:x", "--out", "{out}"),
        ("merge", "{a}:nan", "--out", "{out}"),
        ("merge", "none.safetensors", "--out", "{out}"),
        ("merge", "{a}", "--out", "{out}", "--method", "sum"),
        ("merge", "{a}", "--out", "{out}", "--density", "0.5"),
        ("merge", "{a}:1:OUT09=2", "--out", "{out}"),
        ("resize", "{a}", "{out}"),
        ("resize", "{a}", "{out}", "--rank", "0"),
        ("convert", "{a}", "{out}.bin"),
        ("edit", "{a}", "{out}", "--thumbnail", "{a}"),
        ("inspect", "{a}", "--plot", "{out}"),
        ("doctor", "{a}", "--for", "paint"),
    ],
)
def test_mistakes_are_one_clear_line(words: tuple[str, ...], files: Path) -> None:
    filled = [word.format(a=files / "a.safetensors", out=files / "out.safetensors") for word in words]
    with pytest.raises(UsageError) as caught:
        call(*filled)
    assert "\n" not in str(caught.value) and caught.value.fix and not (files / "out.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["a space", "ümläut", "日本語", "dots.v1.2", "[bold]x", "new\nline", "colon:0.5", "quote'\"", "#hash %20"]
)
def test_files_of_odd_names_have_weights(name: str) -> None:
    source = source_of(f"in {name}/lora {name}.safetensors:0.5")
    assert (source.path, source.weight) == (Path(f"in {name}/lora {name}.safetensors"), 0.5)
