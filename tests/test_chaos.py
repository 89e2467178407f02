"""A short seeded run of the chaos suite (tools/chaos), and that it notices broken promises."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tools.chaos.__main__ import KINDS, chaos
from tools.chaos.child import command, one_line, start, wait
from tools.chaos.hostile import damaged
from tools.chaos.kills import Kills, half_written
from tools.chaos.material import material, tiny_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("chaos") / "base")


def in_fresh_process(name: str, *arguments: str) -> None:
    """Call a function of this file in a new interpreter: the suite forks, and torch's autograd cannot be forked once it was used."""
    tests = Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(tests), str(tests.parent)]!r}; import test_chaos; test_chaos.{name}(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def nothing_breaks(kind: str, base: str) -> None:
    done, broken = chaos(Path(base).parent, Path(base), seed=7, cases=3, only=kind, steps=(4, 8))
    assert done == {kind: 3} and not broken, broken


def broken_promises_are_noticed(folder: str, out: str) -> None:
    base, tmp_path = Path(folder), Path(out)
    given = material(base, base.parent / "given")
    kills = Kills(base, given, tmp_path, (4, 4))
    whole, _ = kills.reference("dreambooth", 4)
    jobs = kills.jobs("dreambooth", tmp_path / "cut", 4)
    assert wait(kills.begin(jobs, tmp_path / "log"), tmp_path / "log", 900).code == 0
    assert not list(kills.differences(jobs, whole, tmp_path / "cut"))
    file = jobs[0].out / "lora.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))].view(-1)[0] += 1e-3
    save_file(tensors, file)
    assert any("of its norm off" in line for line in kills.differences(jobs, whole, tmp_path / "cut"))
    file.write_bytes(file.read_bytes()[:-5])
    (jobs[0].out / "events.jsonl").write_text('{"step": 0')
    assert {line.split()[0] for line in half_written(tmp_path / "cut")} == {"lora.safetensors", "events.jsonl"}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_breaks(kind: str, base: Path) -> None:
    in_fresh_process("nothing_breaks", kind, str(base))


def test_broken_promises_are_noticed(base: Path, tmp_path: Path) -> None:
    in_fresh_process("broken_promises_are_noticed", str(base), str(tmp_path))


def test_how_a_command_ends_is_judged(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def fails() -> int:
        raise ValueError("unexpected")

    def kills_itself() -> int:
        signal.raise_signal(signal.SIGKILL)
        return 0

    assert "ValueError: unexpected" in one_line(wait(start(fails, log), log))
    assert "exit -9" in one_line(wait(start(kills_itself, log), log))
    assert one_line(wait(start(command(["doctor", str(tmp_path / "none")]), log), log)) == ""
    assert one_line(wait(start(lambda: 0, log), log)) == "" and one_line(wait(start(lambda: 1, log), log)) != ""


def test_damage_depends_on_the_seed() -> None:
    data = bytes(range(256))
    assert damaged(random.Random(3), data) == damaged(random.Random(3), data)
    assert len({damaged(random.Random(seed), data) for seed in range(20)} - {data}) > 10
