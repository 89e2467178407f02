"""Options of every training run beside its method's settings: resolution, schedule, warm-up, batch, alpha, optimiser, prompts."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from unbraid.bases.base import load
from unbraid.bases.presets import OPTIMIZERS
from unbraid.cli.run import parsed_templates
from unbraid.common.errors import UsageError
from unbraid.core.lora import Branch
from unbraid.core.passes import answer
from unbraid.core.recipe import ForwardRequest, Sample
from unbraid.core.train import draw, train
from unbraid.runs import folder, pace
from unbraid.runs.api import learn_job, pair_job, split_job
from unbraid.runs.batch import recorded
from unbraid.runs.job import Training, checked_training, opened_images, prompts_of
from unbraid.runs.prepare import Ready, prepare
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_with_them_is_resumed_bit_for_bit(
    optimizer: str, v_base: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "SAVE_EVERY", 0.0)
    options: dict[str, Any] = {"base": str(v_base), "rank": 2, "steps": 4, "previews": 0, "lr": 1e-2, "prompt": "a cat"}
    more: dict[str, Any] = {"schedule": "linear", "warm_up": 1, "resolution": 48}
    more |= {"batch_size": 2, "alpha": 3.0, "optimizer": optimizer, "templates": {"both": "a photo of {prompt}"}}
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
    [({"resolution": -1}, "Give 0 to"), ({"resolution": 10**6}, "Give 0 to"), ({"warm_up": -1}, "Give 0 to"),
     ({"schedule": "cosin"}, "Did you mean 'cosine'"), ({"batch_size": 0}, "Give 1 to"), ({"alpha": -1.0}, "Give 0"),
     ({"alpha": float("nan")}, "Give 0"), ({"alpha": float("inf")}, "Give 0")],
)  # fmt: skip
def test_values_out_of_range_are_one_line(wrong: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as raised:
        checked_training(**wrong)
    assert str(raised.value).isprintable()


def test_a_batch_is_the_mean_of_its_samples(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """The gradient of a step is the mean over its samples, however many share a pass; its figures too."""
    options: dict[str, Any] = {
        "base": str(v_base),
        "rank": 2,
        "steps": 1,
        "lr": 1e-2,
        "weight_decay": 0.0,
        "prompt": "a",
    }
    made = []
    for size in (1, 3):
        job = learn_job(picture, out=tmp_path, batch_size=size, **options)
        base = load(str(v_base), "cpu")
        base.denoiser.double()  # in single precision a batch of another size is rounded differently, by processor
        made.append(prepare(job, prompts_of(job), opened_images(job), base))
        made[-1].adapters.detach()
    single, batch = made
    examples = batch.recipe.examples(0)
    drawn = draw(batch.run_data, batch.recipe, examples, torch.Generator().manual_seed(0))
    samples = [replace(one, noisy=one.noisy.double(), target=one.target.double()) for one in drawn]
    assert len(examples) == 3 and len({float(sample.t) for sample in samples}) == 3, "each has its own noise and time"

    def gradients(
        ready: Ready, some: list[Branch], at_once: int, taken: list[Sample]
    ) -> tuple[list[Tensor], list[Tensor]]:
        ready.adapters.attach_again()
        losses = answer(ForwardRequest(ready.run_data, ready.adapters, some, taken), at_once)
        found = [p.grad.clone() for p in ready.adapters.training() if p.grad is not None]
        ready.state.optimizer.zero_grad()
        ready.adapters.detach()
        return losses, found

    (branch,) = single.recipe.branches(0)
    alone = [gradients(single, [branch], 1, [sample]) for sample in samples]
    means = [torch.stack(some).mean(0) for some in zip(*(found for _, found in alone), strict=True)]
    for at_once in (1, 2, 4):
        losses, found = gradients(batch, list(examples), at_once, samples)
        torch.testing.assert_close(torch.stack(losses), torch.stack([loss for (loss,), _ in alone]), rtol=1e-6, atol=0)
        assert found
        for one, mean in zip(found, means, strict=True):
            torch.testing.assert_close(one, mean, rtol=1e-5, atol=1e-6 * float(mean.abs().max()))
    batch.adapters.attach_again()
    (step,) = train(batch.run_data, batch.recipe, batch.state)
    assert len(step.losses) == 1 and step.loss == pytest.approx(step.losses[0])
    batch.adapters.detach()


def test_alpha_is_refused_where_it_would_scale_a_part(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """The style adapter of `pair` has rows of its own, and QR-LoRA's factors are those of the base."""
    Image.new("RGB", (48, 48), "grey").save(after := tmp_path / "after.png")
    common: dict[str, Any] = {"base": str(v_base), "steps": 2, "rank": 2, "previews": 0, "alpha": 4.0}
    for job in (
        pair_job(picture, after, subject="cat", style="ink", out=tmp_path / "pair", **common),
        learn_job(picture, prompt="a cat", method="qr-lora", out=tmp_path / "qr", **common),
    ):
        with pytest.raises(UsageError, match="--alpha: the form of"):
            list(run(job, device="cpu"))
        assert not (job.out / "lora.safetensors").exists() and not (job.out / "style.safetensors").exists()
    consis = split_job(picture, subject="cat", style="ink", method="consislora", out=tmp_path / "consis", **common)
    list(run(consis, device="cpu"))
    assert (consis.out / "style.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"), [("pair", {"compat": "official"}), ("pair", {}), ("unziplora", {"content_alone": 0.5})]
)
def test_methods_with_several_branches_take_batches(
    method: str, settings: dict[str, Any], v_base: Path, picture: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {
        "base": str(v_base),
        "steps": 2,
        "rank": 2,
        "previews": 0,
        "batch_size": 2,
        "subject": "cat",
    }
    if method == "pair":
        Image.new("RGB", (48, 48), "grey").save(after := tmp_path / "after.png")
        job = pair_job(picture, after, style="ink", out=tmp_path / "run", **common, **settings)
    else:
        job = split_job(picture, style="ink", out=tmp_path / "run", **common, **settings)
    events = [event for event in run(job, device="cpu") if event.step]
    assert len(events) == 2 and all(event.step and len(event.step.losses) == 2 for event in events[1:])


def test_alpha_is_the_strength_of_new_adapters(v_base: Path, picture: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": str(v_base), "rank": 4, "steps": 2, "previews": 0, "prompt": "a cat", "lr": 1e-2}
    files = {}
    for alpha in (0.0, 4.0, 8.0):
        job = learn_job(picture, out=tmp_path / f"{alpha}", alpha=alpha, **options)
        list(run(job, device="cpu"))
        files[alpha] = load_file(job.out / "lora.safetensors")
    assert all(torch.equal(value, files[4.0][key]) for key, value in files[0.0].items()), "the rank is the usual alpha"
    ups = [key for key in files[0.0] if "lora_up" in key or "lora_B" in key]
    norm = {alpha: sum(float(file[key].float().norm()) for key in ups) for alpha, file in files.items()}
    assert norm[8.0] == pytest.approx(2 * norm[4.0], rel=0.2), "the steps of AdamW do not depend on the gradients' size"
    del options["rank"]
    going_on = learn_job(
        picture, out=tmp_path / "on", from_=tmp_path / "8.0" / "lora.safetensors", alpha=2.0, **options
    )
    with pytest.raises(UsageError, match=r"--alpha: the form of lora is that of"):
        list(run(going_on, device="cpu"))


def test_the_moments_are_chosen(v_base: Path, picture: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base": str(v_base), "rank": 2, "steps": 2, "prompt": "a cat", "out": tmp_path}
    for vram, usual in (("8", "adamw8bit"), ("max", "adamw")):
        assert learn_job(picture, vram=vram, **options).loading.preset.optimizer == usual
        for chosen in OPTIMIZERS:
            assert learn_job(picture, vram=vram, optimizer=chosen, **options).loading.preset.optimizer == chosen


def test_templates_replace_prompts(picture: Path, tmp_path: Path) -> None:
    def texts(**templates: str) -> dict[str, str]:
        return prompts_of(split_job(picture, subject="cat", style="ink", out=tmp_path, templates=templates))

    usual, changed = texts(), texts(content="a photo of a {rare} {subject}")
    assert changed["content"] == "a photo of a sks cat" and {**changed, "content": usual["content"]} == usual
    for role, text, error in (
        ("contents", "a", r"no prompt 'contents'.*Did you mean 'content'"),
        ("content", "a {thing}", r"no word \{thing\}.*\{subject\}"),
        ("content", "a {}", r"no word \{\}"),
        ("content", "a {subject", "is no template"),
        ("content", " ", "is empty"),
    ):
        with pytest.raises(UsageError, match=error):
            texts(**{role: text})
    with pytest.raises(UsageError, match="Write ROLE=TEXT"):
        parsed_templates(["content"])
    assert parsed_templates(["both=a=b"]) == {"both": "a=b"}
