"""`steps` alone shortens a run of every method: the defaults of other settings follow, or one line gives the number that fits."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_every_base import material
from test_run import cli_in_process

from unbraid.common.errors import UsageError
from unbraid.files.lora_file import read
from unbraid.methods import METHODS
from unbraid.methods.entry import ROLES
from unbraid.runs import shortest
from unbraid.runs.api import pair_job, split_job
from unbraid.runs.job import finished
from unbraid.runs.run import run
from unbraid.runs.settings import resolve


@pytest.fixture(scope="module")
def given(v_base: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> shortest.Material:
    """Pictures, two LoRAs and two modules, from which every method can start."""
    out = tmp_path_factory.mktemp("given")
    found = material(picture, out)
    for method in (shortest.FIRST, "break"):
        for job in shortest.jobs(method, found, out, base=str(v_base), previews=0):
            list(run(job, device="cpu"))
    loras = {role: out / shortest.FIRST / f"{role}.safetensors" for role in ROLES}
    return replace(found, loras=loras, modules={role: out / f"break-{role}" / "module.safetensors" for role in ROLES})


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 12])
@pytest.mark.parametrize("method", METHODS)
def test_steps_alone_shorten_a_run(
    method: str, steps: int, given: shortest.Material, v_base: Path, tmp_path: Path
) -> None:
    entry = METHODS[method]
    options = {"base": str(v_base), "previews": 1 if steps == 4 else 0, "steps": steps}
    if not entry.inputs.of_kind("LoRA", "module"):
        options["rank"] = 2
    if "partner_count" in resolve(method, "icons", None, {}):
        options["partner_count"] = 1
    make = shortest.VERBS[entry.verb]
    if method in ("make", "np-lora"):
        with pytest.raises(UsageError, match=f"--fine-tune {steps}" if method == "make" else "leave steps out"):
            make(method, given, tmp_path, options)
        del options["steps"]
        options |= {"fine_tune": steps} if method == "make" else {}
    for job in make(method, given, tmp_path, options):
        done = list(run(job, device="cpu"))[-1].done
        further = job.settings.get("style_steps", 0)  # ConsisLoRA's second part
        assert done == (0 if method == "np-lora" else steps + further) and further <= steps and finished(job)
        for stem in entry.outputs(job.settings):
            assert read(job.out / f"{stem}.safetensors").modules


def test_defaults_follow_from_steps(picture: Path, tmp_path: Path) -> None:
    def split(**settings: int) -> tuple[int, float]:
        found = split_job(picture, subject="cat", style="ink", **settings).settings  # type: ignore[arg-type]
        return found["window"], found["column_ratio"]

    assert split() == split(steps=48) == (16, 0.3)
    assert split(steps=12) == (4, 0.3) and split(steps=12, sample_times=4) == (3, 0.25)
    after = tmp_path / "after.png"
    after.write_bytes(picture.read_bytes())
    pairs = {steps: pair_job(picture, after, subject="cat", style="ink", steps=steps).settings for steps in (60, 300)}
    assert {steps: found["style_from"] for steps, found in pairs.items()} == {60: 30, 300: 150}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (["steps=12", "window=5"], "window 5 does not fit a period of 4 steps (steps / sample_times). Give window=4"),
        (["sample_times=4", "column_ratio=0.3"], "column_ratio 0.3 does not fit 4 periods (sample_times). Give column_ratio=0.25"),
        (["sample_times=0"], "setting sample_times: 0 is out of range. Give 1 to"),
        (["steps=0"], "setting steps: 0 is out of range. Give 1 to"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_answered_by_one_that_does(
    settings: list[str], what: str, v_base: Path, picture: Path, tmp_path: Path
) -> None:
    command = ["split", str(picture), "--subject=cat", "--style=ink", f"--base={v_base}", f"--out={tmp_path / 'r'}"]
    code, text = cli_in_process([*command, "--quiet", *(f"--set={one}" for one in settings)])
    assert code == 1 and what in text and len(text.splitlines()) == 1


def test_settings_without_training_are_not_passed_over(given: shortest.Material, tmp_path: Path) -> None:
    content, style = (str(given.modules[role]) for role in ROLES)
    command = ["make", content, style, f"--out={tmp_path / 'r'}"]
    for setting, fix in (("steps=4", "--fine-tune 4"), ("lr=1e-3", "--fine-tune 300")):
        code, text = cli_in_process([*command, f"--set={setting}"])
        assert code == 1 and fix in text and not (tmp_path / "r").exists(), text
    code, text = cli_in_process(command)
    assert code == 0 and (tmp_path / "r" / "merged.safetensors").exists(), text
