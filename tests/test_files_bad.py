"""Bad files are refused in one clear line, and no file is half-written."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from spelling import ATTN, lora, save, some

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.files.formats.spelling import DIALECTS, spelled
from unbraid.files.lora_file import read, write

BAD: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(os.urandom(999)),
    "pickle inside": lambda p: torch.save({"a": torch.ones(2)}, p),
    "unknown keys": lambda p: save(p, {"lora_unet_what_is_this.lora_up.weight": torch.ones(2, 2)}),
    "a checkpoint": lambda p: save(p, {"model.diffusion_model.out.2.weight": torch.ones(2, 2)}),
    "NaN": lambda p: save(p, spelled({f"{ATTN}.to_q": Lora(torch.full((1, 2), torch.nan), torch.ones(2, 1), 1.0)}, DIALECTS["diffusers, PEFT"])),
    "half a pair": lambda p: save(p, {f"{ATTN}.to_q.lora_A.weight": torch.ones(2, 2)}),
    "shapes": lambda p: save(p, {f"{ATTN}.to_q.lora_A.weight": torch.ones(2, 2), f"{ATTN}.to_q.lora_B.weight": torch.ones(2, 3)}),
    "integers": lambda p: save(p, {f"{ATTN}.to_q.lora_A.weight": torch.ones(2, 2, dtype=torch.int8), f"{ATTN}.to_q.lora_B.weight": torch.ones(2, 2)}),
    "LoHa": lambda p: save(p, {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.ones(2, 2)}),
    "LoKr": lambda p: save(p, {"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": torch.ones(2, 2)}),
    "DoRA": lambda p: save(p, {f"{ATTN}.to_q.lora_magnitude_vector.weight": torch.ones(2)}),
    "twice": lambda p: save(p, {f"{n}.lora_up.weight": torch.ones(2, 2) for n in ("lora_unet_middle_block_1_proj_in", "lora_unet_mid_block_attentions_0_proj_in")}),
    "a folder": lambda p: p.mkdir(),
    "a broken link": lambda p: p.symlink_to("nowhere"),
    "settings": lambda p: save(p, spelled({f"{ATTN}.to_q": lora(0)}, DIALECTS["diffusers, PEFT"]), {"lora_adapter_metadata": "{"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_give_one_clear_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    BAD[kind](path)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth"])
def test_pickles_are_refused_unopened(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="any code"):
        read(tmp_path / f"a{suffix}")


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"old")
    for bad in (OSError(28, "No space left on device"), PermissionError("no")):

        def fail(*_: object, error: OSError = bad) -> None:
            raise error

        monkeypatch.setattr("unbraid.files.lora_file.save_file", fail)
        with pytest.raises(UsageError, match="cannot be written"):
            write(tmp_path / "a.safetensors", some(), family="sdxl")
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    with pytest.raises(UsageError, match="no modules"):
        write(tmp_path / "a.safetensors", {}, family="sdxl")
    with pytest.raises(UsageError, match="safetensors"):
        write(tmp_path / "a.bin", some(), family="sdxl")
