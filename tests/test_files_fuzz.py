"""Broken and hostile files are read as a LoRA or refused in one line; no crash, no hang, no excess of memory."""

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from unbraid.common.errors import LONGEST, UsageError
from unbraid.files.doctor import diagnose
from unbraid.files.lora_file import read
from unbraid.files.merge import Size
from unbraid.files.report import interference, report
from unbraid.files.tools import Source, convert, edit, merge_files, resize

FILES = int(os.environ.get("UNBRAID_FUZZ", "400"))


def good(rng: random.Random) -> bytes:
    stem = rng.choice(
        [
            "lora_unet_middle_block_1_proj_in",
            "unet.mid_block.attentions.0.proj_in",
            "double_blocks.0.processor",
            "lora_unet_double_blocks_0_img_attn_qkv",
        ]
    )
    down, up = rng.choice(
        [
            ("lora_down.weight", "lora_up.weight"),
            ("lora_A.weight", "lora_B.weight"),
            ("qkv_lora1.down.weight", "qkv_lora1.up.weight"),
        ]
    )
    dtype = rng.choice([torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
    shapes = rng.choice(
        [((2, 6), (6, 2)), ((2, 6, 3, 3), (6, 2, 1, 1)), ((6, 2), (2, 6)), ((0, 6), (6, 0)), ((2,), (2,))]
    )
    one = (
        torch.full(shapes[0], rng.choice([1.0, float("nan"), float("inf"), 0.0])).nan_to_num(0, posinf=0)
        if dtype == torch.int64
        else torch.full(shapes[0], rng.choice([1.0, float("nan"), 0.0]))
    )
    tensors = {f"{stem}.{down}": one.to(dtype), f"{stem}.{up}": torch.ones(shapes[1]).to(dtype)}
    if rng.random() < 0.5:
        tensors[f"{stem}.alpha"] = rng.choice(
            [torch.tensor(2.0), torch.ones(3), torch.tensor(float("nan")), torch.tensor(0.0)]
        )
    settings = rng.choice(
        [
            None,
            "{",
            "[]",
            "{}",
            '{"unet.lora_alpha": "x", "unet.alpha_pattern": [1]}',
            "[" * 5000,
            '{"unet.lora_alpha": 1e999}',
        ]
    )
    return save(tensors, {"lora_adapter_metadata": settings} if settings else None)


def header(table: object, data: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def hostile(rng: random.Random) -> bytes:
    huge = 2 ** rng.choice([31, 40, 50, 62])
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("data.pkl", b"\0" * 10**6)
    key = "unet.mid_block.attentions.0.proj_in.lora_A.weight"
    return rng.choice(
        [
            b"",
            struct.pack("<Q", huge) + b"{}",
            archive.getvalue(),
            b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.",
            header({key: {"dtype": "F16", "shape": [huge, huge], "data_offsets": [0, huge]}}),
            header({key: {"dtype": "F16", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
            header({key: {"dtype": "F16", "shape": [-1], "data_offsets": [0, 2]}}, b"ab"),
            header({key: {"dtype": "X", "shape": [1], "data_offsets": [0, 2]}}, b"ab"),
            header({"__metadata__": {"a": 1}}),
            header({key: {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"a"),
            header([[]]),
            header({"\ud800": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}, b"ab"),
            header(
                {
                    "lora_unet_" + "a_" * 20000 + ".lora_up.weight": {
                        "dtype": "F16",
                        "shape": [1],
                        "data_offsets": [0, 2],
                    }
                },
                b"ab",
            ),
        ]
    )


def broken(rng: random.Random) -> bytes:
    data = bytearray(good(rng))
    how = rng.random()
    if how < 0.3:
        return bytes(data[: rng.randrange(len(data))])
    for _ in range(rng.randrange(1, 9)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def test_fuzzed_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "a.safetensors"
    refused = 0
    for _ in range(FILES):
        path.write_bytes(rng.choice([good, broken, broken, hostile])(rng))
        for tool in (read, report, lambda p: diagnose(p, "comfyui"), lambda p: diagnose(p, "diffusers")):
            try:
                tool(path)
            except UsageError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) <= LONGEST
    assert refused > FILES and not Path("hacked").exists()


@pytest.mark.parametrize("kind", ["loop", "folder", "fifo", "missing"])
def test_things_that_are_no_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(UsageError):
        read(path)


DTYPES = {"F8_E4M3": 1, "F8_E5M2": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}
NAMES = [
    "lora_unet_middle_block_1_proj_in",
    "unet.mid_block.attentions.0.proj_in",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "diffusion_model.layers.0.attention.to_q",
    "transformer.transformer_blocks.0.attn.to_q",
    "unet." + "x" * 400,
    "base_model.model." * 20 + "unet.mid_block.attentions.0.proj_in",
    "unet.\x1b[31m.y",
    "lora_unet_input_blocks_\u00b2_1_proj_in",
    "lora_unet_down_blocks_" + "9" * 300 + "_attentions_0_proj_in",
    ".oft_" * 90,
]
TOLD = [
    "{",
    "[]",
    '{"unet.r": 1.2.3}',
    '{"unet.lora_alpha": 1e999}',
    '{"unet.alpha_pattern": {"(x*)*": 1}}',
    "[" * 5000,
]


def strange(rng: random.Random) -> bytes:
    """One LoRA module with wrong names, dtypes, shapes, values, alpha or settings."""
    name, (down, up) = rng.choice(NAMES), rng.choice([("lora_down", "lora_up"), ("lora_A", "lora_B")])
    rank, k, d = (rng.choice([1, 2, 5, 16, 300]) for _ in range(3))
    shapes = {f"{name}.{down}.weight": [rank, k], f"{name}.{up}.weight": [d, rng.choice([rank, rank, rank, k])]}
    if rng.random() < 0.6:
        shapes[f"{name}.alpha"] = rng.choice([[], [1], [0], [2], [1] * 7, [1] * 40])
    if rng.random() < 0.2:
        shapes[f"{name}.lora_mid.weight"] = [rank, rank, 3, 3] if rank < 20 else [rank, 1, 2, 2]
    if rng.random() < 0.2:
        shapes[rng.choice(list(shapes))] = rng.choice([[0, 2**62], [], [4], [1, 1, 1], [2] * 9])
    table: dict[str, object] = (
        {"__metadata__": {"lora_adapter_metadata": rng.choice(TOLD)}} if rng.random() < 0.3 else {}
    )
    data = b""
    for key, shape in shapes.items():
        dtype = rng.choice(["F16", "F32", rng.choice(list(DTYPES))])
        size = prod(shape) * DTYPES[dtype]
        table[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += rng.choice(
            [bytes(size), b"\x01" * size, rng.randbytes(size), (b"\x00\x3c\x80\x3f" * (size // 4 + 1))[:size]]
        )
    head = json.dumps(table).encode()
    return struct.pack("<Q", len(head)) + head + data


def test_strange_files_through_every_tool(tmp_path: Path) -> None:
    rng = random.Random(1)
    path, out, fine = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "fine"))
    fine.write_bytes(
        save({f"{NAMES[1]}.lora_A.weight": torch.ones(2, 16), f"{NAMES[1]}.lora_B.weight": torch.ones(16, 2)})
    )
    work: dict[str, Callable[[], object]] = {
        "doctor": lambda: diagnose(path, "comfyui"),
        "inspect": lambda: report(path),
        "compare": lambda: interference(fine, path),
        "convert": lambda: convert(path, out),
        "edit": lambda: edit(path, out, ("proj=0.5",), 0.7),
        "resize": lambda: resize(path, out, Size(2)),
        "concat": lambda: merge_files([Source(path, 0.7), Source(fine)], out),
        **{m: lambda m=m: merge_files([Source(fine), Source(path)], out, m) for m in ("np-lora", "knots")},
    }
    done = 0
    for _ in range(FILES):
        path.write_bytes(strange(rng))
        for tool in work.values():
            try:
                tool()
                done += 1
            except UsageError as error:
                assert str(error).isprintable() and len(str(error)) <= LONGEST
    assert done > FILES
