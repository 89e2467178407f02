"""The reports of doctor and inspect, in words and numbers, without torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tools.loader_table import converted, markdown, written
from unbraid.cli.files import app
from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta
from unbraid.files.doctor import diagnose
from unbraid.files.formats.blocks import to_ldm
from unbraid.files.formats.tool_rules import TOOLS
from unbraid.files.formats.unets import unet_modules
from unbraid.files.formats.widths import width as true_width
from unbraid.files.lora_file import read, write
from unbraid.files.plot import plot_interference
from unbraid.files.report import interference, report
from unbraid.files.tools import convert

ATTENTION = [
    f"unet.down_blocks.1.attentions.0.transformer_blocks.{i}.attn{n}.to_{x}"
    for i in (0, 1)
    for n in (1, 2)
    for x in "qkv"
]
FEED = [f"unet.down_blocks.1.attentions.0.transformer_blocks.{i}.ff.net.2" for i in (0, 1)]


def make(seed: int = 0, names: list[str] | None = None, rank: int = 3, width: int = 2048) -> dict[str, Lora]:
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name in names or ATTENTION + FEED:
        k = width if "attn2.to_k" in name or "attn2.to_v" in name else true_width("sdxl", name) or 10
        out[name] = Lora(torch.randn(rank, k, generator=rng), torch.randn(8, rank, generator=rng), 2.0)
    return out


def saved(path: Path, keys: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in keys.items()}, path, metadata)
    return path


def raw(modules: dict[str, Lora], name, down: str, up: str, alpha: bool = False) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for module, one in modules.items():
        out |= {f"{name(module)}.{down}": one.down, f"{name(module)}.{up}": one.up}
        if alpha:
            out[f"{name(module)}.alpha"] = torch.tensor(one.alpha)
    return out


def kohya(module: str) -> str:
    return "lora_unet_" + module.removeprefix("unet.").replace(".", "_")


def ldm(module: str) -> str:
    return "lora_unet_" + (to_ldm(module.removeprefix("unet.")) or "").replace(".", "_")


@pytest.mark.parametrize("tool", TOOLS)
def test_what_we_write_is_healthy(tool: str, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", make(), family="sdxl")
    found = diagnose(tmp_path / "a.safetensors", tool)
    assert found.healthy and found.loads == found.modules == len(ATTENTION + FEED) and not found.mend


def test_diffusers_files_elsewhere(tmp_path: Path) -> None:
    path = saved(tmp_path / "my lora.safetensors", raw(make(), str, "lora_A.weight", "lora_B.weight"))
    comfy = diagnose(path, "comfyui")
    assert comfy.loads == len(FEED) and len(comfy.dropped) == 2 * len(ATTENTION)  # only the feed-forward ones
    assert "refuse" not in comfy.refused and "convert" in comfy.mend and "'" in comfy.mend
    assert diagnose(path, "forge").loads == 0 and "12" in diagnose(path, "forge").refused
    assert diagnose(path, "invokeai").refused and diagnose(path, "a1111").loads == 0
    assert diagnose(path, "diffusers").healthy
    convert(path, tmp_path / "b.safetensors", "kohya")
    assert all(diagnose(tmp_path / "b.safetensors", tool).healthy for tool in TOOLS)


@pytest.mark.slow
def test_794_modules_of_which_comfyui_knows_234_by_their_diffusers_names(tmp_path: Path) -> None:
    modules = {
        f"unet.{name}": Lora(torch.ones(1, true_width("sdxl", f"unet.{name}") or 1), torch.ones(1, 1), 1.0)
        for name in unet_modules("sdxl")
    }
    path = saved(tmp_path / "a.safetensors", raw(modules, str, "lora_A.weight", "lora_B.weight"))
    assert diagnose(path, "comfyui").loads == 234
    write(tmp_path / "b.safetensors", modules, family="sdxl")
    assert all(diagnose(tmp_path / "b.safetensors", tool).loads == 794 for tool in TOOLS)


def test_the_known_traps(tmp_path: Path) -> None:
    mixed = raw(make(), lambda m: ldm(m) if "attn1" in m else kohya(m), "lora_down.weight", "lora_up.weight", True)
    path = saved(tmp_path / "mixed.safetensors", mixed)
    assert diagnose(path, "diffusers").loads == len(make()) - 6 and "partially" in diagnose(path, "invokeai").refused
    assert diagnose(path, "comfyui").healthy
    doubled = raw(make(), lambda m: "unet." + m, "lora.down.weight", "lora.up.weight")
    assert "doubled" in diagnose(saved(tmp_path / "a.safetensors", doubled), "diffusers").refused
    both = raw(make(), kohya, "lora_down.weight", "lora_up.weight", True)
    path = saved(tmp_path / "a.safetensors", both, {"lora_adapter_metadata": "{}"})
    assert "lora_adapter_metadata" in diagnose(path, "diffusers").refused
    alphas = {key: t * (2 if "attn1" in key and "alpha" in key else 1) for key, t in both.items()}
    warned = diagnose(saved(tmp_path / "a.safetensors", alphas), "diffusers")
    assert "alphas differ" in warned.warnings[0] and diagnose(tmp_path / "a.safetensors", "comfyui").healthy
    blind = make(names=["unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"])
    write(tmp_path / "a.safetensors", blind, family="sdxl")
    assert "attn2.to_k" in diagnose(tmp_path / "a.safetensors", "invokeai").refused
    flat = {
        "lora_te1_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 2),
        "lora_te1_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 1),
    }
    assert diagnose(saved(tmp_path / "a.safetensors", flat), "comfyui").loads == 0
    strange = both | {
        "lora_unet_what.lora_up.weight": torch.ones(1, 1),
        "lora_unet_down_blocks_7_attentions_0_proj_in.lora_up.weight": torch.ones(1, 1),
    }
    found = diagnose(saved(tmp_path / "a.safetensors", strange), "comfyui")
    assert set(found.dropped) == set(strange) - set(both) and "no such module" in " ".join(found.dropped.values())


def test_nan_and_other_kinds_are_told(tmp_path: Path) -> None:
    keys = raw(make(), kohya, "lora_down.weight", "lora_up.weight")
    first = next(iter(keys))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        bad = {key: tensor.to(dtype).clone() for key, tensor in keys.items()}
        bad[first].view(-1)[1] = torch.nan
        found = diagnose(saved(tmp_path / "a.safetensors", bad), "comfyui")
        assert first in found.warnings[0] and not found.mend
    keys["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"] = torch.ones(2, 2)
    assert "LoHa" in diagnose(saved(tmp_path / "a.safetensors", keys), "comfyui").warnings[0]
    with pytest.raises(UsageError, match="comfyui"):
        diagnose(tmp_path / "a.safetensors", "fooocus")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_report_is_right(dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", make(), family="sdxl", dtype=dtype, metadata={"modelspec.title": "x"})
    file = read(tmp_path / "a.safetensors")
    found = report(tmp_path / "a.safetensors")
    want = sum(float(delta(one).double().norm() ** 2) for one in file.modules.values()) ** 0.5
    assert found.family == "sdxl" and found.ranks == {3: 14} and found.alphas == {2.0: 14}
    assert [block.block for block in found.blocks] == ["IN04"] and found.blocks[0].norm == pytest.approx(want, rel=1e-4)
    assert found.namings == ("kohya ldm",) and found.blocks[0].share == pytest.approx(1)


@pytest.mark.usefixtures("arranged")
def test_interference_equals_its_dense_definition(tmp_path: Path) -> None:
    name = ATTENTION[0]
    first, second = make(1, [name], 3), make(2, [name], 2)
    for path, modules in (("a", first), ("b", second)):
        write(tmp_path / f"{path}.safetensors", modules, family="sdxl", dtype=torch.float32)
    (found,) = interference(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    a, b = delta(first[name]).double(), delta(second[name]).double()
    assert found.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-5)
    columns = torch.cosine_similarity(a, b, dim=0).abs().numpy()
    assert np.allclose(found.columns, columns, atol=1e-5)
    bases = [torch.linalg.qr(one[name].down.double().T)[0] for one in (first, second)]
    assert found.overlap == pytest.approx(float((bases[0].T @ bases[1]).square().sum() / 2), abs=1e-5)
    same = interference(tmp_path / "a.safetensors", tmp_path / "a.safetensors")[0]
    assert same.cosine == pytest.approx(1) and same.overlap == pytest.approx(1) and same.columns.min() > 0.999
    plot_interference([found, same], tmp_path / "x.png", ("a", "b"))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    other = make(2, ["unet.mid_block.attentions.0.proj_in"])
    write(tmp_path / "b.safetensors", other, family="sdxl")
    with pytest.raises(UsageError, match="common"):
        interference(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_no_torch_is_imported(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", make(), family="sdxl")
    code = (
        "import sys; from unbraid.files.doctor import diagnose; from unbraid.files.report import report, interference;"
        "import unbraid.cli.main; p = sys.argv[1]; diagnose(p, 'comfyui'); report(p); interference(p, p);"
        "assert not {'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")], check=True, timeout=60)


@pytest.mark.slow
def test_the_docs_tables_are_what_the_command_prints() -> None:
    docs = (Path(__file__).parent.parent / "docs" / "files.md").read_text()
    mending, writing = list(converted()), list(written())
    assert markdown(mending, "read") in docs and markdown(writing, "written") in docs
    assert all(set(row.tools.values()) == {"yes"} for row in mending), "every dialect in, every tool served"
    families = ["sdxl", "sd15", "flux", "flux2", "sd3", "qwen-image", "z-image"]
    assert [row.family for row in writing if row.dialect == "kohya"] == families


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    modules = {"transformer.single_transformer_blocks.0.proj_out": Lora(torch.ones(1, 4), torch.ones(4, 1), 1.0)}
    write(tmp_path / "a.safetensors", modules, family="flux", dialect="diffusers")
    assert not diagnose(tmp_path / "a.safetensors", "invokeai").known
    assert "cannot run" in diagnose(tmp_path / "a.safetensors", "a1111").refused
    assert diagnose(tmp_path / "a.safetensors", "comfyui").healthy


TO_K, TO_Q = (f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn{x}" for x in ("2_to_k", "1_to_q"))
LORA = {f"{TO_K}.lora_down.weight": torch.ones(2, 2048), f"{TO_K}.lora_up.weight": torch.ones(640, 2)}
LOHA = {f"{TO_K}.hada_w{i}_{a}": torch.ones(*((640, 2) if a == "a" else (2, 2048))) for i in "12" for a in "ab"}
LOKR = {f"{TO_K}.lokr_w1": torch.ones(8, 8), f"{TO_K}.lokr_w2": torch.ones(80, 256)}


def inspected(path: Path) -> str:
    done = CliRunner().invoke(app, ["inspect", str(path)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("side", ["down", "up"])
@pytest.mark.parametrize("owner", [TO_K, TO_Q])
def test_a_factors_bias_is_its_modules(owner: str, side: str, tmp_path: Path) -> None:
    """It does not count as an unknown module. If the factors are missing, the module is reported as incomplete."""
    path = tmp_path / "a.safetensors"
    save_file(LORA | {f"{owner}.lora_{side}.bias": torch.ones(640)}, path)
    found, printed = diagnose(path, "comfyui"), inspected(path)
    assert "1 tensors of biases: not shown" in printed and "no table knows" not in printed
    assert any(warning.startswith("1 tensors of biases") for warning in found.warnings) and not found.dropped
    assert (found.modules, found.loads) == ((1, 1) if owner == TO_K else (2, 1))
    alone = any("attn1.to_q has no lora_down and no lora_up" in warning for warning in found.warnings)
    assert alone == (owner == TO_Q) == ("1 modules are incomplete" in printed)
    with pytest.raises(UsageError, match="biases"):
        read(path)


UNREAD = {
    "1 tensors of OFT: not shown": {f"{TO_Q}.oft_blocks": torch.ones(4, 160, 160)},
    "1 tensors of biases: not shown": {f"{TO_Q}.lora_up.bias": torch.ones(640)},
    "1 tensors are no part of a LoRA, such as something.else": {"something.else": torch.ones(3)},
    "attn1.to_q, which has no lora_up: not shown": {f"{TO_Q}.lora_down.weight": torch.ones(2, 640)},
    "attn1.to_q, which has no lokr_w2: not shown": {f"{TO_Q}.lokr_w1": torch.ones(8, 8)},
    "attn1.to_q, which has no hada_w2_a and no hada_w2_b: not shown": {
        f"{TO_Q}.hada_w1_{a}": torch.ones(4, 4) for a in "ab"
    },
}


@pytest.mark.parametrize("expected", UNREAD)
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
def test_inspect_shows_what_is_read_and_says_what_is_not(kind: str, expected: str, tmp_path: Path) -> None:
    tensors, path = {"LoRA": LORA, "LoHa": LOHA, "LoKr": LOKR}[kind], tmp_path / "a.safetensors"
    save_file(tensors, path)
    want = report(path).blocks
    save_file(tensors | UNREAD[expected], path)
    printed = inspected(path)
    assert report(path).blocks == want and want[0].norm > 0 and expected in printed
    assert kind == "LoRA" or f"tensors of {kind}" in printed
    assert interference(path, path)[0].cosine == pytest.approx(1, abs=1e-5)
