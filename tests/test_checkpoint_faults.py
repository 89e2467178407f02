"""What bake and extract refuse: the error is one line, and no file is left behind."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TO_Q, layers, random_lora
from ldm import save_header
from safetensors.torch import load_file, save_file
from tiny_bases import Tiny

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.files.bake import bake
from unbraid.files.extract import extract
from unbraid.files.lora_file import write
from unbraid.files.merge import Size
from unbraid.files.tools import Source


def faults(tiny: Tiny, other: Tiny, tmp_path: Path) -> dict[str, Any]:
    good = tmp_path / "good.safetensors"
    write(good, {TO_Q: random_lora(layers(tiny))[TO_Q]}, family="sdxl")
    odd = tmp_path / "odd.safetensors"
    write(odd, {TO_Q: Lora(torch.ones(2, 7), torch.ones(64, 2), 2.0)}, family="sdxl")
    huge = tmp_path / "huge.safetensors"
    write(
        huge, {TO_Q: Lora(torch.full((1, 64), 3e4), torch.full((64, 1), 3e4), 1.0)}, family="sdxl", dtype=torch.float32
    )
    half = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in load_file(tiny.file).items()}, half)
    flux = tmp_path / "flux.safetensors"
    write(
        flux,
        {"transformer.transformer_blocks.0.attn.to_q": Lora(torch.ones(2, 8), torch.ones(8, 2), 2.0)},
        family="flux",
        dialect="diffusers",
    )
    out = tmp_path / "out.safetensors"
    size = Size(rank=2)
    return {
        "transformer_blocks.0.attn.to_q": lambda: bake(tiny.file, [Source(flux)], out),
        "are not in the checkpoint": lambda: bake(other.file, [Source(_wide(tiny, tmp_path))], out),
        "does not fit a weight": lambda: bake(tiny.file, [Source(odd)], out),
        "too large for the checkpoint's dtype": lambda: bake(half, [Source(huge)], out),
        "no UNet is found": lambda: bake(good, [Source(good)], out),
        "this is a folder": lambda: bake(tiny.folder, [Source(good)], out),
        "would replace": lambda: bake(half, [Source(good)], half),
        "as .safetensors": lambda: bake(tiny.file, [Source(good)], tmp_path / "out.ckpt"),
        "no LoRA to bake": lambda: bake(tiny.file, [], out),
        "no such file": lambda: bake(tmp_path / "none.safetensors", [Source(good)], out),
        "no layer differs": lambda: extract(tiny.file, tiny.file, out, size),
        "no size": lambda: extract(tiny.file, tiny.file, out, Size()),
        "in one of the checkpoints only": lambda: extract(tiny.file, other.file, out, size),
    }


def _wide(tiny: Tiny, tmp_path: Path) -> Path:
    """A LoRA on all layers of SDXL, including the second text encoder."""
    write(tmp_path / "all.safetensors", random_lora(layers(tiny)), family="sdxl")
    return tmp_path / "all.safetensors"


def test_faults_are_one_line_and_leave_nothing(tiny_sdxl: Tiny, tiny_sd15: Tiny, tmp_path: Path) -> None:
    for message, run in faults(tiny_sdxl, tiny_sd15, tmp_path).items():
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(UsageError, match=message.replace(".", r"\.")) as found:
            run()
        assert "\n" not in str(found.value)
        assert before == sorted(
            path.name for path in tmp_path.iterdir() if path.name != "all.safetensors" or path.name in before
        )


def test_a_full_disk_is_told_before_anything_is_written(tiny_sdxl: Tiny, tmp_path: Path) -> None:
    """The checkpoint's header claims more bytes than any disk has; the file has none of them."""
    write(tmp_path / "l.safetensors", {TO_Q: random_lora(layers(tiny_sdxl))[TO_Q]}, family="sdxl")
    state = {key: value.to("meta") for key, value in load_file(tiny_sdxl.file).items()}
    free = shutil.disk_usage(tmp_path).free
    state["first_stage_model.huge"] = torch.empty(free // 2**21 + 1000, 2**20, dtype=torch.float16, device="meta")
    with pytest.raises(UsageError, match="are needed and"):
        bake(
            save_header(state, tmp_path / "big.safetensors"),
            [Source(tmp_path / "l.safetensors")],
            tmp_path / "o.safetensors",
        )
    assert not (tmp_path / "o.safetensors").exists()


def test_a_disk_that_fills_meanwhile_leaves_nothing(tiny_sdxl: Tiny, tmp_path: Path) -> None:
    write(tmp_path / "l.safetensors", {TO_Q: random_lora(layers(tiny_sdxl))[TO_Q]}, family="sdxl")
    pid = os.fork()  # in its own process, because a limit on file sizes cannot be lifted again
    if not pid:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            bake(tiny_sdxl.file, [Source(tmp_path / "l.safetensors")], tmp_path / "o.safetensors")
        except UsageError as error:
            os._exit(0 if "cannot be written" in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.safetensors"]
