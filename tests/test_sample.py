"""Sampling, compared with diffusers' own pipelines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bases import diffusion

from unbraid.bases import base as bases
from unbraid.bases.base import Base
from unbraid.bases.families import BLOCKS
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Lora
from unbraid.files.lora_file import write
from unbraid.sampling.render import Sampling, render
from unbraid.sampling.sample import Term, classifier_free, generate
from unbraid.sampling.samplers import SAMPLERS, with_sampler
from unbraid.sampling.uses import OWN, STYLE_NAME, Use

SIZE = 32


def as_array(image: object) -> np.ndarray:
    return np.asarray(image, np.int16)


def stock(base: Base, prompt: str, seed: int, guidance: float) -> np.ndarray:
    rng = torch.Generator().manual_seed(seed)
    out = base.pipe(
        prompt,
        generator=rng,
        guidance_scale=guidance,
        num_inference_steps=4,
        height=SIZE,
        width=SIZE,
    )
    return as_array(out.images[0])  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["v_base", "eps_base", "sd15_base"])
def test_classifier_free_guidance_equals_the_stock_pipeline(kind: str, request: pytest.FixtureRequest) -> None:
    base = bases.load(str(request.getfixturevalue(kind)), "cpu")
    prompts = {"main": base.encode_prompt("a cat"), "negative": base.encode_negative()}
    images = generate(base, classifier_free(5.0, "main"), prompts, seeds=(3, 4), steps=4)
    for seed, image in zip((3, 4), images, strict=True):
        expected = stock(base, "a cat", seed, 5.0)
        assert expected.std() > 1, "the oracle's picture must not be blank"
        assert np.abs(as_array(image) - expected).max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_equals_the_stock_pipeline(sampler: str, v_model: Base) -> None:
    (ours,) = render(v_model, "a cat", sampling=Sampling(guidance=5.0, seeds=(3,), steps=4, sampler=sampler))
    expected = stock(with_sampler(v_model, sampler), "a cat", 3, 5.0)
    assert expected.std() > 1 and np.abs(as_array(ours) - expected).max() <= 1


def test_an_unknown_sampler_is_one_clear_line(v_model: Base) -> None:
    with pytest.raises(UsageError, match="Did you mean 'euler'"):
        render(v_model, "a cat", sampling=Sampling(sampler="eular"))


@pytest.mark.parametrize("kind", ["v_base", "eps_base"])
def test_a_lora_file_gives_the_stock_pipelines_picture(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """`load_lora_weights` on our file and unbraid's own sampling give the same picture."""
    base = bases.load(str(request.getfixturevalue(kind)), "cpu")
    rng = torch.Generator().manual_seed(0)
    adapters = Adapters.attach(base.denoiser)
    adapters.new("a", 4, rng, up_std=0.1)
    modules = {f"unet.{name}": lora for name, lora in adapters.folded("a").items()}
    adapters.detach()
    path = tmp_path / "a.safetensors"
    write(path, modules, family="sdxl", dtype=torch.float32)
    plain = stock(base, "a cat", 1, 3.0)
    (ours,) = render(base, "a cat", [Use(path)], sampling=Sampling(guidance=3.0, seeds=(1,), steps=4))
    base.pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    theirs = stock(base, "a cat", 1, 3.0)
    assert np.abs(theirs - plain).max() > 10, "the LoRA must matter"
    assert np.abs(as_array(ours) - theirs).max() <= 2


def test_terms_are_a_weighted_sum_in_their_time(v_model: Base) -> None:
    """A term outside its interval does not count; the other terms are summed with their weights."""
    prompts = {name: v_model.encode_prompt(name) for name in ("a cat", "a dog", "negative")}
    from unbraid.sampling.sample import Guided

    x, sizes = torch.randn(2, 4, 8, 8), torch.full((2, 6), 32.0)
    terms = (Term(-1.5, "negative"), Term(2.0, "a cat", t_max=0.5), Term(0.5, "a dog", t_min=0.3))

    def passes(t: int, *wanted: tuple[float, str]) -> torch.Tensor:
        out = torch.zeros_like(x)
        for weight, name in wanted:
            out += weight * v_model.predict(x, torch.tensor([t, t]), [prompts[name]] * 2, sizes)
        return out

    guided = Guided(v_model, terms, prompts, None)
    with torch.no_grad():
        for t, wanted in (
            (900, ((-1.5, "negative"), (0.5, "a dog"))),
            (400, ((-1.5, "negative"), (2.0, "a cat"), (0.5, "a dog"))),
            (100, ((-1.5, "negative"), (2.0, "a cat"))),
        ):
            out = guided(x, torch.tensor(t), added_cond_kwargs={"time_ids": sizes})[0]
            assert torch.allclose(out, passes(t, *wanted), atol=1e-5)


def test_a_seed_means_the_same_in_any_batch(v_model: Base) -> None:
    prompts = {"main": v_model.encode_prompt("a cat"), "negative": v_model.encode_prompt("")}
    terms = classifier_free(3.0, "main")
    many = generate(v_model, terms, prompts, seeds=(5, 6, 7), steps=3)
    (one,) = generate(v_model, terms, prompts, seeds=(6,), steps=3)
    assert np.abs(as_array(many[1]) - as_array(one)).max() <= 1


def test_recorded_prompts_come_from_the_file_and_change_the_picture(v_model: Base, tmp_path: Path) -> None:
    adapters = Adapters.attach(v_model.denoiser)
    adapters.new("a", 4, torch.Generator().manual_seed(0), up_std=0.1)
    modules = {f"unet.{name}": lora for name, lora in adapters.folded("a").items()}
    adapters.detach()
    recorded = {"unbraid.prompt": "a teapot in ink style", "unbraid.style": "ink"}
    write(tmp_path / "a.safetensors", modules, family="sdxl", metadata=recorded)
    sampling = Sampling(steps=3, height=SIZE, width=SIZE)
    pictures = [
        as_array(render(v_model, "a cat", [Use(tmp_path / "a.safetensors", prompt=prompt)], sampling=sampling)[0])
        for prompt in (None, OWN, "a teapot in ink style", "a cat", STYLE_NAME, "ink style")
    ]
    assert np.array_equal(pictures[1], pictures[2]) and np.array_equal(pictures[4], pictures[5])
    rounding, change = (np.abs(pictures[0] - pictures[i]).mean() for i in (3, 1))
    assert rounding < 0.5 and change > 10 * rounding, "the same prompt goes another way through the layers"
    write(tmp_path / "b.safetensors", modules, family="sdxl")
    for prompt, what in (
        (OWN, "records no prompt"),
        (STYLE_NAME, "does not say what its style is called.*--lora-prompt"),
    ):
        with pytest.raises(UsageError, match=what):
            render(v_model, "a cat", [Use(tmp_path / "b.safetensors", prompt=prompt)])
    content = {"unbraid.prompt": "a sks teapot", "unbraid.style": "ink"}
    write(tmp_path / "c.safetensors", modules, family="sdxl", metadata=content)
    with pytest.raises(UsageError, match=r"'a sks teapot', which names no style.*own"):
        render(v_model, "a cat", [Use(tmp_path / "c.safetensors", prompt=STYLE_NAME)])


def test_a_lora_for_another_base_is_refused_and_the_base_stays_whole(
    v_model: Base, sd15_base: Path, tmp_path: Path
) -> None:
    name = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    write(tmp_path / "wide.safetensors", {name: Lora(torch.zeros(2, 2048), torch.zeros(640, 2), 2.0)}, family="sdxl")
    before = [type(module) for module in v_model.denoiser.modules()]
    with pytest.raises(UsageError, match=r"wide\.safetensors.*made for another base"):
        render(v_model, "a cat", [Use(tmp_path / "wide.safetensors")])
    assert [type(module) for module in v_model.denoiser.modules()] == before
    with pytest.raises(
        UsageError, match=r"made for SDXL, and used with .*: 1 of its 1 modules are not there. Give the base"
    ):
        render(bases.load(str(sd15_base), "cpu"), "a cat", [Use(tmp_path / "wide.safetensors")])


def test_bases_say_what_they_are(v_base: Path, sd15_base: Path, tmp_path: Path) -> None:
    v, sd15 = bases.load(str(v_base), "cpu"), bases.load(str(sd15_base), "cpu")
    assert (v.family.name, v.size, v.step) == ("sdxl", 32, 16) and sd15.family.name == "sd15"
    assert (
        diffusion(v).scheduler.config["prediction_type"] == "v_prediction"
        and float(diffusion(v).scheduler.alphas_cumprod[-1]) == 0
    )
    assert {"sdxl", "sd15"} <= set(BLOCKS)
    for wrong in ("nowhere", "./nowhere/at-all", str(tmp_path)):
        with pytest.raises(UsageError):
            bases.load(wrong, "cpu")


def test_active_scale_zero_is_the_base(v_model: Base) -> None:
    prompts = {"main": v_model.encode_prompt("a cat")}
    adapters = Adapters.attach(v_model.denoiser)
    adapters.new("a", 4, torch.Generator().manual_seed(0), up_std=0.5)
    on, off, none = (
        as_array(generate(v_model, (Term(1.0, "main", active),), prompts, adapters, steps=2)[0])
        for active in ((Active("a"),), (Active("a", 0.0),), ())
    )
    assert np.array_equal(off, none) and not np.array_equal(on, none)
