"""What the file tools report and keep: numbers of any type, embeddings, metadata, other bases, printable messages."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from spelling import ATTN, lora, save
from torch import Tensor
from typer.testing import CliRunner

from unbraid.cli.files import app
from unbraid.common.errors import LONGEST, UsageError, printable
from unbraid.files.doctor import diagnose
from unbraid.files.formats.header import read_header
from unbraid.files.formats.tool_rules import TOOLS
from unbraid.files.formats.weights import numbers
from unbraid.files.lora_file import read
from unbraid.files.merge import Size
from unbraid.files.report import interference, report
from unbraid.files.tools import Source, convert, edit, merge_files, resize

KEY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def kohya(
    alpha: Tensor | None = None, dtype: torch.dtype = torch.float32, key: str = KEY, k: int = 640
) -> dict[str, Tensor]:
    one = lora(0, k, k, 4, dtype=torch.float32)
    out = {f"{key}.lora_down.weight": one.down.to(dtype), f"{key}.lora_up.weight": one.up.to(dtype)}
    return out | ({} if alpha is None else {f"{key}.alpha": alpha})


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_an_alpha_is_a_number_of_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", kohya(torch.tensor(2).to(dtype)))
    assert read(path).modules[f"{ATTN}.to_q"].alpha == 2 and report(path).alphas == {2.0: 1}
    assert all(diagnose(path, tool).healthy for tool in TOOLS if tool != "invokeai")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_read_as_torch_reads_them(dtype: torch.dtype, tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    path = save(tmp_path / "a.safetensors", {"x": codes})
    with numbers(read_header(path)) as value:
        assert np.array_equal(value("x"), codes.float().numpy(), equal_nan=True)
    path = save(path, kohya(torch.tensor(4.0), dtype))
    assert report(path).blocks[0].norm > 0 and interference(path, path)[0].cosine == pytest.approx(1)
    bad = kohya(dtype=dtype)
    bad[f"{KEY}.lora_up.weight"].view(torch.uint8)[0, 0] = 0x7F
    assert "NaN" in diagnose(save(path, bad), "comfyui").warnings[0]


def test_embeddings_come_along(tmp_path: Path) -> None:
    extra = {"bundle_emb.ema y.clip_l": torch.randn(2, 8)}
    a, out = save(tmp_path / "a.safetensors", kohya() | extra), tmp_path / "out.safetensors"
    b = save(tmp_path / "b.safetensors", kohya())
    works: tuple[Callable[[], object], ...] = (
        lambda: convert(a, out, "diffusers"),
        lambda: resize(a, out, Size(rank=1)),
        lambda: edit(a, out, (), 0.5),
        lambda: merge_files([Source(a), Source(b)], out),
    )
    for work in works:
        work()
        assert torch.equal(load_file(out)["bundle_emb.ema y.clip_l"], extra["bundle_emb.ema y.clip_l"])
    other = save(tmp_path / "c.safetensors", kohya() | {"bundle_emb.ema y.clip_l": torch.zeros(2, 8)})
    with pytest.raises(UsageError, match="embeddings"):
        merge_files([Source(a), Source(other)], out)


def test_a_merge_keeps_what_its_sources_say(tmp_path: Path) -> None:
    given_metadata = {"modelspec.trigger_phrase": "sks octopus", "modelspec.prediction_type": "v", "ss_clip_skip": "2"}
    one = given_metadata | {"ss_tag_frequency": json.dumps({"a": {"octopus": 5}}), "ss_sd_model_name": "pony"}
    two = given_metadata | {"ss_tag_frequency": json.dumps({"b": {"ink": 7}}), "ss_sd_model_name": "other"}
    two["modelspec.trigger_phrase"] = "in ink"
    files = [save(tmp_path / f"{i}.safetensors", kohya(), meta) for i, meta in enumerate((one, two, {}))]
    merge_files([Source(file) for file in files], tmp_path / "out.safetensors")
    found = read_header(tmp_path / "out.safetensors").metadata
    assert found["modelspec.trigger_phrase"] == "sks octopus, in ink" and found["modelspec.prediction_type"] == "v"
    assert json.loads(found["ss_tag_frequency"]) == {"a": {"octopus": 5}, "b": {"ink": 7}}
    assert found["ss_clip_skip"] == "2" and "ss_sd_model_name" not in found


def test_sd21_has_its_own_label(tmp_path: Path) -> None:
    one = lora(0, 320, 1024, dtype=torch.float32)
    name = "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn2.to_k"
    path = save(
        tmp_path / "a.safetensors",
        {f"{name}.lora_A.weight": one.down, f"{name}.lora_B.weight": one.up},
        {"ss_base_model_version": "sd_v1"},
    )
    convert(path, tmp_path / "b.safetensors")
    given_metadata = read_header(tmp_path / "b.safetensors").metadata
    assert (
        read(path).family == "sd21"
        and given_metadata["ss_base_model_version"] == "sd_v2"
        and given_metadata["ss_v2"] == "True"
    )


def test_a_lora_of_another_base_is_not_said_to_load(tmp_path: Path) -> None:
    path, out = save(tmp_path / "a.safetensors", kohya(k=128)), tmp_path / "b.safetensors"
    convert(path, out)
    given_metadata = read_header(out).metadata
    assert read(out).family == "sdxl" and not any(
        "xl-v1" in value or "sdxl_" in value for value in given_metadata.values()
    )
    found = {tool: diagnose(out, tool) for tool in TOOLS}
    assert all("128" in one.refused and not one.loads for tool, one in found.items() if tool != "diffusers")
    assert not any(one.mend for one in found.values()) and "128" in found["diffusers"].warnings[0]


def test_doctor_says_true_things(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lokr = {f"{KEY}.lokr_w1": torch.ones(2, 2), f"{KEY}.lokr_w2": torch.ones(2, 2), f"{KEY}.alpha": torch.tensor(1.0)}
    found = diagnose(save(path, lokr), "comfyui")
    assert not found.known and found.loads == 0 and "twice" not in " ".join(found.warnings)
    zero = {key: tensor * 0 for key, tensor in kohya().items()}
    assert "all its weights are 0" in diagnose(save(path, zero), "comfyui").warnings[0]
    dots = kohya(key="unet.output_blocks.1.1.transformer_blocks.5.attn1.to_v", k=1280)
    found = diagnose(save(path, dots), "comfyui")
    assert found.loads == 0 and "--to kohya" in found.mend
    save(path, kohya(torch.tensor(4.0)))
    assert not any(diagnose(path, tool).mend for tool in TOOLS)
    for name in ("ComfyUI", "comfy", "A1111", "automatic1111", "Forge", "Invoke", "diff"):
        assert diagnose(path, name).tool
    with pytest.raises(UsageError):
        diagnose(path, "")


@pytest.mark.parametrize("strength", [1e300, 1e-300, float("nan"), float("inf")])
def test_a_strength_of_no_use_is_refused(strength: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="strength"):
        edit(save(tmp_path / "a.safetensors", kohya()), tmp_path / "b.safetensors", (), strength)
    assert not (tmp_path / "b.safetensors").exists()


def test_what_a_file_says_is_shown_printable_and_short(tmp_path: Path) -> None:
    evil = "\x1b[31mred\x1b]0;x\x07\u202e\n" * 400
    path = save(tmp_path / "a.safetensors", kohya(), {"modelspec.title": evil, "modelspec.trigger_phrase": evil})
    out = CliRunner().invoke(app, ["inspect", str(path)]).output
    path = save(path, kohya(key=f"unet.\x1b[2Jx{'y' * 300}"))
    out += (
        CliRunner().invoke(app, ["doctor", str(path)]).output + CliRunner().invoke(app, ["inspect", str(path)]).output
    )
    assert all(line.isprintable() and len(line) < 300 for line in out.splitlines()) and "red" in out
    for error in (UsageError(evil, evil, evil), UsageError("x", "/" + "a" * 999, "y"), UsageError("x" * 999)):
        assert len(str(error)) <= LONGEST and str(error).isprintable()
    assert printable("a" * 50, 20).startswith("aaa") and len(printable("a" * 50, 20)) == 20
