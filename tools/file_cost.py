"""Measures time and memory of the file commands at full size: SDXL LoRAs of 722 modules, rank 64, fp16.
`python -m tools.file_cost`

Each command runs in its own process, as for a user. Memory is its peak above the peak of a process that only imports the
same code, as a multiple of the size of the input files. Times are the median (and range) of three runs. The second table
compares the factorised SVD with the dense one that it replaces, in this process.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta, truncate
from unbraid.files.formats.unets import unet_modules
from unbraid.files.lora_file import write

RANK, FULL, REPEATS = 64, 722, 3
WIDTHS = {"down_blocks.1": 640, "up_blocks.1": 640}  # channels of the transformers; in all other blocks 1280
CONTEXT = 2048  # channels of the text embeddings


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds, CPU seconds, peak resident memory in bytes."""

    wall: float
    cpu: float
    peak: int


def shape(name: str) -> tuple[int, int]:
    """(d, k) of a linear layer of SDXL's transformers."""
    width = next((w for block, w in WIDTHS.items() if name.startswith(block)), 1280)
    if name.endswith("ff.net.0.proj"):
        return 8 * width, width
    if name.endswith("ff.net.2"):
        return width, 4 * width
    return (width, CONTEXT) if re.search(r"attn2\.to_[kv]$", name) else (width, width)


def synthetic(rank: int, seed: int) -> dict[str, Lora]:
    """A random fp16 LoRA on all linear layers of SDXL's transformers."""
    rng = torch.Generator().manual_seed(seed)
    names = sorted(name for name in unet_modules("sdxl") if re.search(r"\.attentions\.", name))
    assert len(names) == FULL
    out = {}
    for name in names:
        d, k = shape(name)
        down, up = torch.randn(rank, k, generator=rng) / k**0.5, torch.randn(d, rank, generator=rng) / 8
        out[f"unet.{name}"] = Lora(down.half(), up.half(), rank / 2)
    return out


def cost(arguments: list[str]) -> Cost:
    """Run Python with `arguments` in a new process and measure it."""
    os.sync()  # so that writes of earlier runs do not slow this one down
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments)}: status {status}")
    kib = 1024 if sys.platform == "linux" else 1
    return Cost(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * kib)


def commands(folder: Path) -> None:
    """Print the table of the commands."""
    first, second, wide = (str(folder / f"{name}.safetensors") for name in ("a", "b", "wide"))
    out = str(folder / "out.safetensors")
    write(first, synthetic(RANK, 0), family="sdxl")
    write(second, synthetic(RANK, 1), family="sdxl")
    idle = cost(["-c", "import torch, safetensors.torch, unbraid.files.tools"]).peak
    light = cost(["-c", "import unbraid.cli.files"]).peak
    todo: dict[str, tuple[list[str], list[str]]] = {  # name → input files, arguments of `unbraid`
        "convert --to diffusers": ([first], ["convert", first, out, "--to", "diffusers"]),
        "merge, concat": ([first, second], ["merge", first, second, "--out", wide]),
        "merge, concat, 0.7 and 0.4": ([first, second], ["merge", f"{first}:0.7", f"{second}:0.4", "--out", wide]),
        "resize 128 to 64": ([wide], ["resize", wide, out, "--rank", "64"]),
        "doctor": ([first], ["doctor", first]),
        "inspect": ([first], ["inspect", first]),
        "inspect, two files": ([first, second], ["inspect", first, second]),
    }
    print("| command | input, MB | wall, s | CPU, s | memory, × input |\n|---|---|---|---|---|")
    for name, (inputs, words) in todo.items():
        size = sum(Path(path).stat().st_size for path in inputs)
        runs = [cost(["-m", "unbraid", *words]) for _ in range(REPEATS)]
        wall, cpu = (
            f"{median(x):.2f} ({min(x):.2f} to {max(x):.2f})"
            for x in zip(*[(r.wall, r.cpu) for r in runs], strict=True)
        )
        base = light if words[0] in ("doctor", "inspect") else idle
        peak = max(run.peak for run in runs)
        print(f"| {name} | {size / 1e6:.0f} | {wall} | {cpu} | {(peak - base) / size:.2f} |")


def against_dense() -> None:
    """Print the seconds to truncate one module from rank 128 to 64, both ways, and check that the results agree."""
    torch.set_num_threads(1)
    print("\n| ΔW, rank 128 | QR and core SVD, s | dense SVD, s | ratio |\n|---|---|---|---|")
    for d, k in ((640, 640), (1280, 1280), (1280, 2048), (1280, 5120)):
        rng = torch.Generator().manual_seed(0)
        one = Lora(torch.randn(128, k, generator=rng), torch.randn(d, 128, generator=rng), 128.0)
        (small, quick), (want, slow) = _timed(_factorised, one), _timed(_dense, one)
        assert (delta(small) - delta(want)).norm() < 1e-4 * delta(one).norm()
        print(f"| {d} × {k} | {quick:.3f} | {slow:.3f} | {slow / quick:.0f} |")


def _timed(how: Callable[[Lora], Lora], one: Lora) -> tuple[Lora, float]:
    began = time.perf_counter()
    return how(one), time.perf_counter() - began


def _factorised(one: Lora) -> Lora:
    return truncate(one, RANK)[0]


def _dense(one: Lora) -> Lora:
    u, s, vt = torch.linalg.svd(delta(one), full_matrices=False)
    return Lora(vt[:RANK], u[:, :RANK] * s[:RANK], float(RANK))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        commands(Path(where))
    against_dense()
