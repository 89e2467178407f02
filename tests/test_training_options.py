"""Options of every training run beside its method's settings: resolution, schedule, warm-up, the rare token."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unbraid.bases.base import load
from unbraid.common.errors import UsageError
from unbraid.runs import folder, pace
from unbraid.runs.api import learn_job, split_job
from unbraid.runs.batch import recorded
from unbraid.runs.job import Training, checked_training, opened_images, prompts_of
from unbraid.runs.prepare import prepare
from unbraid.runs.run import run


def test_rates_rise_and_fall() -> None:
    def factors(**options: Any) -> list[float]:
        return [round(Training(**options).factor(step, 8), 3) for step in range(8)]

    assert factors() == [1.0] * 8
    assert factors(warm_up=3) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert factors(schedule="linear") == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    cosine = factors(schedule="cosine", warm_up=2)
    assert (
        cosine[:3] == [0.333, 0.667, 1]
        and cosine[5] == 0.5
        and cosine == [*cosine[:2], *sorted(cosine[2:], reverse=True)]
    )
    assert all(0 < factor <= 1 for factor in factors(warm_up=100)), "longer than the run"


def test_a_run_with_them_is_resumed_bit_for_bit(
    v_base: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "SAVE_EVERY", 0.0)
    options: dict[str, Any] = {"base": str(v_base), "rank": 2, "steps": 4, "previews": 0, "lr": 1e-2, "prompt": "a cat"}
    more = {"schedule": "linear", "warm_up": 1, "resolution": 48}
    whole = learn_job(picture, out=tmp_path / "whole", **options, **more)
    list(run(whole, device="cpu"))
    cut = learn_job(picture, out=tmp_path / "cut", **options, **more)
    for event in (events := run(cut, device="cpu")):
        if event.done == 3:
            break
    events.close()  # type: ignore[attr-defined]
    assert recorded(cut.out / folder.RECORD) == cut
    list(run(cut, resume=True, device="cpu"))
    plain = learn_job(picture, out=tmp_path / "plain", **options, resolution=48)
    list(run(plain, device="cpu"))
    one, two, other = (load_file(job.out / "lora.safetensors") for job in (whole, cut, plain))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not all(torch.equal(value, other[key]) for key, value in one.items())
    record = tomllib.loads((whole.out / folder.RECORD).read_text())
    assert {key: record[key] for key in more} == more
    assert not more.keys() & tomllib.loads((plain.out / folder.RECORD).read_text()).keys() - {"resolution"}


def test_pictures_have_the_resolution(v_base: Path, picture: Path, tmp_path: Path) -> None:
    sizes = {}
    for side in (0, 64):
        job = learn_job(picture, prompt="a cat", out=tmp_path, base=str(v_base), rank=2, steps=1, resolution=side)
        ready = prepare(job, prompts_of(job), opened_images(job), load(str(v_base), "cpu"))
        sizes[side] = ready.run_data.pictures["image"][0].mean.shape[-1]
        ready.adapters.detach()
    assert sizes[64] == 2 * sizes[0], "the base's own is 32 pixels"


def test_the_rare_token(picture: Path, tmp_path: Path) -> None:
    job = split_job(picture, subject="cat", style="ink", out=tmp_path, rare="ohwx")
    assert prompts_of(job)["content"] == "a ohwx cat" and job.data.words["rare"] == "ohwx"
    assert prompts_of(split_job(picture, subject="cat", style="ink", out=tmp_path))["content"] == "a sks cat"
    with pytest.raises(UsageError, match="--rare: is empty"):
        prompts_of(split_job(picture, subject="cat", style="ink", out=tmp_path, rare=" "))
    with pytest.raises(UsageError, match=r"no rare token.*Write the token into the prompt"):
        learn_job(picture, prompt="a ohwx cat", rare="ohwx")


@pytest.mark.parametrize(
    ("wrong", "what"),
    [((-1, "constant", 0), "Give 0 to"), ((10**6, "constant", 0), "Give 0 to"), ((0, "constant", -1), "Give 0 to"),
     ((0, "cosin", 0), "Did you mean 'cosine'")],
)  # fmt: skip
def test_values_out_of_range_are_one_line(wrong: tuple[int, str, int], what: str) -> None:
    with pytest.raises(UsageError, match=what) as raised:
        checked_training(*wrong)
    assert str(raised.value).isprintable()
