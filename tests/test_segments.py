"""Three texts in one sequence of joint attention that cannot read each other, on tiny random Flux and SD3.5."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers as tiny
import torch
from test_every_base import loaded
from test_transformers import KINDS, drawn, stock
from torch import Tensor

from unbraid.bases import base as bases
from unbraid.bases.base import Base
from unbraid.bases.families.family import Prompt
from unbraid.bases.families.segments import segmented
from unbraid.common.errors import UnsuitedError, UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.layers import TRANSFORMERS
from unbraid.core.lora import Active
from unbraid.files.lora_file import read
from unbraid.methods import METHODS
from unbraid.runs import run as running
from unbraid.runs.api import split_job
from unbraid.runs.memory import estimate
from unbraid.sampling.render import Sampling, Use, render

pytestmark = pytest.mark.slow

ROLE = "both+content+style"
CONTENT, STYLE = Active("content", prompt="content", segment=(1, 3)), Active("style", prompt="style", segment=(2, 3))


@pytest.fixture(scope="module", params=("flux-dev", "sd35-medium"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(KINDS[request.param].make(), tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture
def base(folder: Path) -> Base:
    found = bases.load(str(folder), "cpu")
    found.denoiser.double()
    return found


def predicted(base: Base, prompts: list[Prompt], rows: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 16, 8, 12, generator=rng, dtype=torch.float64).expand(rows, -1, -1, -1)
    return base.predict(noisy, torch.full((rows,), 500.0), prompts, torch.zeros(rows, 6))


def adapted(base: Base, up_std: float) -> Adapters:
    adapters, rng = Adapters.attach(base.denoiser, TRANSFORMERS, base.family.network.layers), torch.Generator()
    for i, role in enumerate(("content", "style")):
        adapters.new(role, 2 + i, rng.manual_seed(i), up_std=up_std)
        for one in adapters.of(role).values():
            one.double()
    return adapters


def encoded(base: Base, **texts: str) -> dict[str, Prompt]:
    """Prompts in fp64, and the one with segments."""
    found = {role: base.encode_prompt(text) for role, text in texts.items()}
    found = {role: Prompt(one.embeds.double(), one.pooled) for role, one in found.items()}  # type: ignore[arg-type]
    return {**found, ROLE: segmented(ROLE, found)}


def embeds(prompts: Mapping[str, Prompt]) -> dict[str, Tensor]:
    return {role: prompt.embeds for role, prompt in prompts.items()}


def test_three_equal_texts_and_adapters_of_zero_give_the_bases_answer(base: Base) -> None:
    prompts = encoded(base, both="a cat", content="a cat", style="a cat")
    plain = predicted(base, [prompts["both"]])
    adapters = adapted(base, 0.0)
    with torch.no_grad(), adapters.activate([(CONTENT, STYLE)], embeds(prompts)):
        torch.testing.assert_close(predicted(base, [prompts[ROLE]]), plain, atol=1e-10, rtol=0)
    adapters.detach()
    other = encoded(base, both="a cat", content="a big dog", style="a cat")
    assert float((predicted(base, [other[ROLE]]) - plain).abs().max()) > 1e-6


def test_an_adapter_on_all_segments_is_the_adapter_on_a_plain_text_also_in_a_batch(base: Base) -> None:
    prompts = encoded(base, both="a cat", content="a cat", style="a cat")
    adapters = adapted(base, 0.3)
    every = (Active("content"), Active("style"))
    with torch.no_grad(), adapters.activate([every], embeds(prompts)):
        plain = predicted(base, [prompts["both"]])
        torch.testing.assert_close(predicted(base, [prompts[ROLE]]), plain, atol=1e-10, rtol=0)
    with torch.no_grad(), adapters.activate([(CONTENT, STYLE)], embeds(prompts)):
        apart = predicted(base, [prompts[ROLE]])
    with torch.no_grad(), adapters.activate([(CONTENT, STYLE), every], embeds(prompts)):
        batch = predicted(base, [prompts[ROLE], prompts["both"]], rows=2)
    torch.testing.assert_close(batch, torch.cat([apart, plain]), atol=1e-10, rtol=0)
    assert float((apart - plain).abs().max()) > 1e-6


def first_text(base: Base, prompts: Mapping[str, Prompt], adapters: Adapters) -> tuple[Tensor, ...]:
    """What the first block makes of the text: its three segments, `[tokens, channels]` each."""
    kept: list[Tensor] = []
    block = base.denoiser.transformer_blocks[0]
    hook = block.register_forward_hook(lambda module, args, out: kept.append(out[0]))
    with adapters.activate([(CONTENT, STYLE)], embeds(prompts)):
        predicted(base, [prompts[ROLE]])
    hook.remove()
    return kept[0][0].chunk(3)


def test_a_segment_reads_neither_the_others_nor_their_adapters(base: Base) -> None:
    """In one block. From block to block, all texts meet in the picture."""
    prompts, adapters = encoded(base, both="a cat in ink", content="a cat", style="ink"), adapted(base, 0.3)
    for name, layer in adapters.layers.items():  # on the text alone: on the picture both adapters act
        if not base.family.network.layers.reads_text(name):
            for factors in layer.factors().values():
                factors.up.data.zero_()
    both, content, style = first_text(base, prompts, adapters)
    other = first_text(base, encoded(base, both="a cat in ink", content="a cat", style="oil paint"), adapters)
    assert torch.equal(both, other[0]) and torch.equal(content, other[1]) and not torch.equal(style, other[2])

    def gradients(loss: Tensor, role: str) -> dict[str, Tensor]:
        names = [name for name in adapters.of(role) if name.startswith("transformer_blocks.0.") and "add" in name]
        found = torch.autograd.grad(loss, [adapters.of(role)[name].up for name in names], allow_unused=True)
        return {name: one for name, one in zip(names, found, strict=True) if one is not None}

    mine = gradients(content.square().mean(), "content")
    assert any(one.any() for one in mine.values())
    theirs = gradients(other[1].square().mean(), "content")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    content = first_text(base, prompts, adapters)[1]
    assert not any(one.any() for one in gradients(content.square().mean(), "style").values())


def test_a_split_in_segments_trains_and_its_files_load_in_the_stock_pipeline(
    folder: Path, picture: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"subject": "cat", "style": "ink", "base": str(folder), "rank": 2, "steps": 2, "window": 1}
    given |= {"content_lr": 1e-2, "style_lr": 1e-2, "sample_times": 1, "column_ratio": 0.5}
    job = split_job(picture, **given, segments=True, previews=1, out=tmp_path / "run")
    assert (job.settings["content_alone"], job.settings["style_alone"]) == (0.0, 0.0)
    three = split_job(picture, **given, out=tmp_path / "three")
    assert estimate(job, "cpu").activations != estimate(three, "cpu").activations
    events = list(running.run(job, device="cpu"))
    assert not [event for event in events if event.undone] and (job.out / "sheet.png").exists()
    pipe, kind = stock(folder), KINDS[folder.name]
    plain = drawn(pipe, kind, kind.plain)
    for role in ("content", "style"):
        file = job.out / f"{role}.safetensors"
        with loaded(pipe, file):
            used = {f"transformer.{name}" for name, one in pipe.transformer.named_modules() if hasattr(one, "lora_A")}
            assert used == read(file).modules.keys()
            assert np.abs(drawn(pipe, kind, kind.plain) - plain).max() > 1e-3

    base, quick = bases.load(str(folder), "cpu"), Sampling(steps=3)
    uses = [Use(job.out / f"{role}.safetensors", prompt="own") for role in ("content", "style")]
    own = np.asarray(render(base, "a sks cat in ink style", uses, sampling=quick)[0]).astype(int)
    summed = render(base, "a sks cat in ink style", [replace(use, prompt=None) for use in uses], sampling=quick)[0]
    assert np.abs(own - np.asarray(summed)).max() > 0


def test_with_losses_of_each_adapter_alone(folder: Path, picture: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"subject": "cat", "style": "ink", "base": str(folder), "rank": 2, "steps": 1, "window": 1}
    given |= {"sample_times": 1, "column_ratio": 0.5, "segments": True, "content_alone": 1.0, "previews": 0}
    job = split_job(picture, **given, out=tmp_path / "run")
    (recipe,) = METHODS["unziplora"].make({}, **job.settings)
    assert [branch.prompt for branch in recipe.branches(0)] == [ROLE, "content"]
    losses = [event.step.figures[2:] for event in running.run(job, device="cpu") if event.step]
    alone = split_job(picture, **given, vram="24", out=tmp_path / "in turn")  # in half precision, one branch at a time
    half = [event.step.figures[2:] for event in running.run(alone, device="cpu") if event.step]
    torch.testing.assert_close(losses[0], half[0], atol=0, rtol=0.03)


def test_what_does_not_fit_is_refused(picture: Path, v_base: Path, tmp_path: Path) -> None:
    z_image = tiny.save(tiny.z_image(), tmp_path / "z-image")
    for folder in (v_base, z_image):
        given: dict[str, Any] = {"subject": "cat", "style": "ink", "base": str(folder), "rank": 2, "steps": 3}
        with pytest.raises(UnsuitedError, match="divided into segments"):
            list(running.run(split_job(picture, **given, segments=True, out=tmp_path / "no"), device="cpu"))
    with pytest.raises(UsageError, match="published code has no segments"):
        METHODS["unziplora"].make({}, segments=True, compat="official")
