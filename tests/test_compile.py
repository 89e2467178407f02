"""--compile gives the same run. Runs in separate processes, because the type checks of the tests cannot be traced, and with a backend
that traces and differentiates like `inductor` but generates no code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from unbraid.bases import compiling
from unbraid.runs import pace, run
from unbraid.runs.api import split_job
compiling.BACKEND = "aot_eager"
torch.set_num_threads(1)
pace.SHEET_STEPS = pace.PREVIEW_STEPS = 2
base, picture, out, vram = sys.argv[1:]
found = []
for compile in (False, True):
    job = split_job(picture, subject="dog", style="line", out=f"{out}/{compile}", base=base, steps=4, rank=2, window=1, previews=1, vram=vram, compile=compile)
    found.append([event.step.loss for event in run.run(job, device="cpu") if event.step])
    found.append(counters["stats"]["unique_graphs"])
print(json.dumps(found))
"""


@pytest.mark.parametrize("vram", ["max", "16"])
def test_a_compiled_run_is_the_same(v_base: Path, tmp_path: Path, vram: str) -> None:
    """The preset `16` adds gradient checkpointing and half precision."""
    Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(tmp_path / "one.png")
    call = [sys.executable, "-c", SCRIPT, str(v_base), str(tmp_path / "one.png"), str(tmp_path), vram]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, before, compiled, graphs = json.loads(done.stdout.splitlines()[-1])
    assert before == 0 and 0 < graphs < 20, "blocks of one form share a graph"
    assert len(plain) == 4 and compiled == pytest.approx(plain, rel=1e-4 if vram == "max" else 0.03)
    assert (tmp_path / "True" / "content.safetensors").exists()
    assert "compile = true" in (tmp_path / "True" / "run.toml").read_text()
