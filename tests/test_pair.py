"""Pair Customization: separation of content and style in training, and identities of style guidance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from double import double, in_double
from PIL import Image, ImageDraw
from tiny_bases import diffusion
from torch import Tensor

from unbraid.bases import base as bases
from unbraid.bases.base import Base, Picture, RunData
from unbraid.bases.families import BLOCKS
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.lora import Active, Noise
from unbraid.core.lowrank import delta
from unbraid.core.optim import Rate
from unbraid.core.recipe import Denoiser, Recipe, Sample, Shared
from unbraid.core.state import State
from unbraid.core.train import train
from unbraid.files.lora_file import read
from unbraid.files.merge import merge
from unbraid.images.crop import alignment, fit, open_image
from unbraid.methods.pair import pair, rows
from unbraid.runs.api import pair_job
from unbraid.runs.run import run
from unbraid.sampling.invert import invert, reconstruct
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, Use, render
from unbraid.sampling.sample import NEGATIVE, Guided, Style, Term, style_guidance
from unbraid.sampling.samplers import with_sampler
from unbraid.sampling.sweep import parse_sweep, sweep_sheet

QUICK = {"rank": 4, "steps": 6, "style_from": 2, "lr": 1e-2}


def run_data(base: Base) -> RunData:
    rng = torch.Generator().manual_seed(1)
    base.denoiser.double()
    zeros = torch.zeros(4, 4, 4).double()
    images = {
        role: [Picture(torch.randn(4, 4, 4, generator=rng).double(), zeros, torch.full((6,), 32.0))]
        for role in ("before", "after")
    }
    prompts = {
        role: Prompt(torch.randn(24, 64, generator=rng).double(), torch.randn(64, generator=rng).double())
        for role in ("content", "style")
    }
    return RunData(base, images, prompts)


def trained(base: Base, model: Denoiser | None = None, **settings: object) -> Adapters:
    model, adapters = model or run_data(base), Adapters.attach(base.denoiser)
    (recipe,) = pair(BLOCKS["sdxl"], **{**QUICK, **settings})  # type: ignore[arg-type]
    state = State.fresh(adapters, in_double(recipe), torch.Generator().manual_seed(0))
    for _ in train(model, recipe, state):
        pass
    adapters.detach()
    return adapters


@pytest.fixture
def couple(tmp_path: Path) -> tuple[Path, Path]:
    """A drawing, and the same drawing in black and white."""
    image = Image.new("RGB", (48, 48), "white")
    ImageDraw.Draw(image).ellipse((8, 12, 40, 40), fill="#e07020", outline="black", width=3)
    image.save(tmp_path / "cat.png")
    image.convert("1", dither=Image.Dither.NONE).convert("RGB").save(tmp_path / "cat-ink.png")
    return tmp_path / "cat.png", tmp_path / "cat-ink.png"


def test_rows_are_orthonormal_and_slots_do_not_meet() -> None:
    taken = torch.cat([rows(64, 8, place) for place in range(8)]).double()
    assert torch.allclose(taken @ taken.T, torch.eye(64).double(), atol=1e-6)
    with pytest.raises(UsageError, match="72 orthonormal rows"):
        rows(64, 8, 8)


def test_content_and_style_read_different_inputs_whatever_they_learn(v_model: Base) -> None:
    adapters = trained(v_model)
    moved = 0.0
    for name, content in adapters.of("content").items():
        style = adapters.of("style")[name]
        width = content.down.shape[1]
        assert torch.equal(content.down, rows(width, 4, 0).double()), "the rows are frozen"
        assert torch.equal(style.down, rows(width, 4, 1).double())
        product = content.up @ content.down @ style.down.T @ style.up.T
        assert product.abs().max() < 1e-6 * content.up.norm() * style.up.norm() + 1e-30
        moved = max(moved, float(style.up.detach().abs().max()))
    assert moved > 1e-3


def test_without_orthogonality_they_meet(v_model: Base) -> None:
    adapters = trained(v_model, orthogonal=False)
    content, style = (next(iter(adapters.of(name).values())) for name in ("content", "style"))
    assert (content.down @ style.down.T).abs().max() > 1e-2


class Same:
    """A denoiser with the same samples at every step."""

    def __init__(self, real: RunData) -> None:
        self.real, self.prompts, self.graphs = real, real.prompts, real.graphs
        self.samples = real.draw(
            ["before", "after"], frozenset(("noise", "timestep")), torch.Generator().manual_seed(3)
        )

    def constants(self) -> Sequence[Tensor]:
        return self.real.constants()

    def x0_factor(self, t: Tensor) -> Tensor:
        return self.real.x0_factor(t)

    def draw(
        self, images: Sequence[str], shared: frozenset[Shared], rng: torch.Generator, noises: Sequence[Noise] = ()
    ) -> list[Sample]:
        return [self.samples[("before", "after").index(image)] for image in images]

    def predict(self, samples: Sequence[Sample], prompts: Sequence[str]) -> Tensor:
        return self.real.predict(samples, prompts)


def test_each_loss_trains_its_own_adapter(v_model: Base) -> None:
    """The style adapter does not change before it begins to train, and its loss does not change the content adapter, bit for bit."""
    model = Same(run_data(v_model))
    early, late = (trained(v_model, model, steps=3, style_from=start) for start in (2, 0))
    assert max(float(one.up.detach().abs().max()) for one in early.of("style").values()) < 0.011, "one step at 0.01"
    contents = [adapters.of("content").values() for adapters in (early, late)]
    assert all(torch.equal(a.up, b.up) and a.up.any() for a, b in zip(*contents, strict=True))


def test_official_order_is_content_first(v_model: Base) -> None:
    """One official step is a step on the content alone, then one on the style, on the same samples."""
    model, found = Same(run_data(v_model)), {}
    for name in ("official", "none", "by hand"):
        adapters = Adapters.attach(v_model.denoiser)
        compat = "none" if name == "by hand" else name
        (recipe,) = pair(BLOCKS["sdxl"], rank=4, steps=1, style_from=0, lr=1e-2, compat=compat)  # type: ignore[arg-type]
        state = State.fresh(adapters, in_double(recipe), torch.Generator().manual_seed(0))
        for i in (0, 1) if name == "by hand" else ():
            first = recipe.branches(0)[i : i + 1]
            alone = Recipe(lambda adapters, rng: None, lambda step, b=first: b, recipe.rates, i + 1)
            list(train(model, alone, state))
        if name != "by hand":
            list(train(model, recipe, state, at_once=2))
        found[name] = torch.cat([one.up.flatten() for one in adapters.of("style").values()]).detach()
        adapters.detach()
    assert torch.equal(found["official"], found["by hand"]) and not torch.equal(found["official"], found["none"])


@pytest.mark.slow
def test_a_pair_makes_a_style_and_a_content_lora(v_base: Path, couple: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = pair_job(*couple, subject="cat", style="line", out=out, base=str(v_base), previews=1, **QUICK, slot=1)
    events = list(run(job, device="cpu"))
    assert not any(event.warning for event in events)
    style, content = read(out / "style.safetensors"), read(out / "content.safetensors")
    assert style.metadata["unbraid.style"] == "line" and '"slot": 1' in style.metadata["unbraid.settings"]
    name = next(iter(style.modules))
    product = delta(content.modules[name]) @ delta(style.modules[name]).T
    assert product.abs().max() < 1e-3 * delta(content.modules[name]).norm() * delta(style.modules[name]).norm()
    base = bases.load(str(v_base), "cpu")
    plain, guided = (
        render(
            base, "a dog", styles=StyleGuidance([Use(out / "style.safetensors", scale)]), sampling=Sampling(steps=2)
        )[0]
        for scale in (0.0, 3.0)
    )
    assert plain.tobytes() == render(base, "a dog", sampling=Sampling(steps=2))[0].tobytes() != guided.tobytes()


def test_several_pairs_share_one_style(v_base: Path, couple: tuple[Path, Path], tmp_path: Path) -> None:
    for i, file in enumerate(couple):
        folder = tmp_path / ("plain", "ink")[i]
        folder.mkdir()
        Image.open(file).save(folder / "a.png")
        Image.open(file).rotate(90).save(folder / "b.png")
    (tmp_path / "plain" / "b.txt").write_text("dog")
    options = {"out": tmp_path / "run", "base": str(v_base), "previews": 0, **QUICK}
    job = pair_job(tmp_path / "plain", tmp_path / "ink", subject="cat", style="line", **options)
    assert set(job.data.captions.values()) == {"a sks dog", "a sks dog in line style"} and job.settings["pairs"] == 2
    list(run(job, device="cpu"))
    assert [file.name for file in (tmp_path / "run").glob("*.safetensors")] == ["style.safetensors"]


@pytest.mark.slow
def test_styles_share_rows_or_keep_apart(v_base: Path, couple: tuple[Path, Path], tmp_path: Path) -> None:
    """In one slot, the sum of two styles has the rank of one. In different slots they do not interfere, and a taken slot is refused."""
    options: dict[str, Any] = {"base": str(v_base), "subject": "cat", "previews": 0, **QUICK}
    files, a_style = {}, tmp_path / "a" / "style.safetensors"
    runs: list[tuple[str, dict[str, Any]]] = [
        ("a", {}),
        ("b", {"seed": 1}),
        ("c", {"beside": [a_style]}),
        ("free", {"orthogonal": False}),
    ]
    for name, more in runs:
        list(run(pair_job(*couple, style=name, out=tmp_path / name, **options, **more), device="cpu"))
        files[name] = tmp_path / name / "style.safetensors"
    a, b, c, _ = (read(file).modules for file in files.values())
    for module in a:
        product = delta(a[module]) @ delta(c[module]).T
        assert product.norm() < 1e-3 * delta(a[module]).norm() * delta(c[module]).norm()
    merged = {one.name: one.lora for one in merge([a, b], [0.7, -0.4], dtype=torch.float32)}
    name = next(iter(a))
    assert len(merged[name].down) == len(a[name].down) == merged[name].alpha / 0.7
    assert torch.allclose(delta(merged[name]), 0.7 * delta(a[name]) - 0.4 * delta(b[name]), atol=1e-6)
    assert len(next(iter(merge([a, c], [1.0, 1.0]))).lora.down) == 2 * len(a[name].down)
    with pytest.raises(UsageError, match="slot 0 is claimed already"):
        pair_job(*couple, style="d", slot=0, beside=[files["a"]], out=tmp_path / "d", **options)
    with pytest.raises(UsageError, match="none of the"):
        pair_job(*couple, style="d", beside=[files["free"]], out=tmp_path / "d", **options)
    with pytest.raises(UsageError, match="needs orthogonal rows"):
        pair_job(*couple, style="d", beside=[files["a"]], orthogonal=False, out=tmp_path / "d", **options)


def test_slider_is_signed(v_base: Path, couple: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"out": tmp_path / "run", "base": str(v_base), "previews": 0, "rank": 2, "steps": 3}
    list(run(pair_job(*couple, subject="cat", style="line", method="slider", **options), device="cpu"))
    names = read(tmp_path / "run" / "style.safetensors").modules
    assert names and all(".attn1." in name for name in names)


@pytest.mark.slow
def test_bad_pairs_are_one_clear_line(v_base: Path, couple: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = couple
    image = Image.open(before)
    image.crop((0, 0, 48, 24)).save(tmp_path / "wide.png")
    image.save(tmp_path / "copy.png")
    image.rotate(180).resize((48, 48)).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "styled.png")
    options = {"subject": "cat", "style": "line", "base": str(v_base), "out": tmp_path / "x", "previews": 0, **QUICK}
    cases = [
        ((before, tmp_path / "wide.png"), "different shapes"),
        ((before, tmp_path / "copy.png"), "the same picture twice"),
        ((before, tmp_path), "one is a folder"),
        ((before, tmp_path / "none.png"), "no such image"),
    ]
    for (first, second), what in cases:
        with pytest.raises(UsageError, match=what):
            list(run(pair_job(first, second, **options), device="cpu"))
    with pytest.raises(UsageError, match="or a lower slot"):
        list(run(pair_job(before, after, **options, slot=20), device="cpu"))
    with pytest.raises(UsageError, match="no slot -1"):
        list(run(pair_job(before, after, **options, slot=-1), device="cpu"))
    late: dict[str, Any] = {**options, "style_from": 6}
    with pytest.raises(UsageError, match="style_from"):
        list(run(pair_job(before, after, **late), device="cpu"))
    assert not (tmp_path / "x").exists()
    warnings = [e.warning for e in run(pair_job(tmp_path / "styled.png", before, **options), device="cpu") if e.warning]
    assert any("swapped" in warning for warning in warnings)


def test_alignment_tells_pairs_from_strangers(couple: tuple[Path, Path]) -> None:
    before, after = (Image.open(path).convert("RGB") for path in couple)
    other = Image.new("RGB", (48, 48), "white")
    ImageDraw.Draw(other).rectangle((2, 2, 12, 46), fill="black")
    assert alignment(before, after) > 0.4 > 0.2 > alignment(before, other)


def guided(base: Base, terms: Sequence[Term], adapters: Adapters, prompts: dict[str, Prompt], time: float) -> Tensor:
    rng = torch.Generator().manual_seed(9)
    latent = torch.randn(2, 4, 4, 4, generator=rng).double()
    step = torch.tensor(time * diffusion(base).scheduler.config["num_train_timesteps"])
    with torch.no_grad():
        return Guided(base, terms, prompts, adapters)(latent, step)[0]


@pytest.mark.parametrize("kind", ["v_base", "eps_base"])
def test_identities_of_style_guidance(kind: str, request: pytest.FixtureRequest) -> None:
    base = bases.load(str(request.getfixturevalue(kind)), "cpu")
    base.denoiser.double()
    rng = torch.Generator().manual_seed(1)
    adapters = Adapters.attach(base.denoiser)
    for name in ("a", "b"):
        adapters.new(name, 2, rng, up_std=0.1)
    double(adapters)
    prompts = {
        role: Prompt(torch.randn(24, 64, generator=rng).double(), torch.randn(64, generator=rng).double())
        for role in (NEGATIVE, "main", "a", "b")
    }
    w, a, b = 4.0, Active("a"), Active("b")

    def predicted(terms: Sequence[Term], time: float = 0.5) -> Tensor:
        return guided(base, terms, adapters, prompts, time)

    def one(role: str, *active: Active) -> Tensor:
        return predicted((Term(1.0, role, active),))

    e_u, e_c, e_a, e_b = one(NEGATIVE), one("main"), one("a", a), one("b", b)
    plain = e_u + w * (e_c - e_u)

    def style(scale: float, start: float = 1.0) -> Style:
        return Style(a, "a", scale, start)

    def close(x: Tensor, y: Tensor) -> bool:
        return bool((x - y).abs().max() < 1e-12 * y.abs().max())

    assert close(predicted(style_guidance(w, "main", [style(3.0)])), plain + 3.0 * (e_a - e_c))
    both = [style(3.0), Style(b, "b", -1.5)]
    assert close(predicted(style_guidance(w, "main", both)), plain + 3.0 * (e_a - e_c) - 1.5 * (e_b - e_c))
    assert torch.equal(predicted(style_guidance(w, "main", [style(0.0)])), predicted(style_guidance(w, "main", [])))
    two = style_guidance(w, "main", [style(w)])
    assert len(two) == 2 and close(predicted(two), e_u + w * (e_a - e_u))
    near = predicted(style_guidance(w, "main", [style(w + 1e-9)]))
    assert (near - predicted(two)).abs().max() < 1e-7, "no jump where one evaluation falls away"
    late = style_guidance(w, "main", [style(3.0, start=0.8)])
    assert close(predicted(late, 0.9), predicted(style_guidance(w, "main", []), 0.9))
    assert close(predicted(late, 0.8), predicted(style_guidance(w, "main", [style(3.0)]), 0.8))
    never = style_guidance(w, "main", [style(3.0, start=0.0)])
    assert all(torch.equal(predicted(never, t), predicted(style_guidance(w, "main", []), t)) for t in (0.5, 0.0))
    editing = [style_guidance(scale, "main", [style(3.0)], (), "main") for scale in (1.0, 7.0)]
    assert [len(terms) for terms in editing] == [2, 2] and close(predicted(editing[0]), predicted(editing[1])), (
        "w cancels"
    )


def psnr(a: Image.Image, b: Image.Image) -> float:
    x, y = (torch.from_numpy(np.asarray(one, np.float64) / 255) for one in (a, b))
    return float(-10 * (x - y).square().mean().log10())


@pytest.mark.slow
def test_an_edit_at_strength_zero_gives_the_picture_back(couple: tuple[Path, Path], tmp_path: Path) -> None:
    """On the embedded base, with a PSNR of at least 30 dB to the picture after the autoencoder; a drawing from noise has far less."""
    base, file = bases.load("icons", "cpu"), tmp_path / "wide.png"
    Image.open(couple[0]).resize((64, 48)).save(file)
    best = reconstruct(base, fit(open_image(file), base.size**2, base.step))
    (back,) = render(base, "a ball", inputs=ImageInputs(edit=file), sampling=Sampling(steps=50))
    (other,) = render(base, "a ball", sampling=Sampling(steps=5, height=best.height, width=best.width))
    assert back.size == best.size and psnr(back, best) > 30 > psnr(other, best)
    with pytest.raises(UsageError, match="keeps what it is"):
        render(base, "a ball", inputs=ImageInputs(edit=file), sampling=Sampling(seeds=(0, 1)))


@pytest.mark.parametrize("kind", ["v_base", "eps_base", "sd15_base"])
def test_inversion_undoes_ddim(
    kind: str, request: pytest.FixtureRequest, couple: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exact denoiser of Gaussian latents with deviation 1/2, for epsilon and for v."""
    base = with_sampler(bases.load(str(request.getfixturevalue(kind)), "cpu"), "ddim")
    alphas = base.pipe.scheduler.alphas_cumprod

    def predict(noisy: Tensor, t: Tensor, prompts: Sequence[Prompt], sizes: Tensor) -> Tensor:
        alpha = alphas[int(t[0])]
        noise = (1 - alpha).sqrt() * noisy / (alpha / 4 + 1 - alpha)
        if diffusion(base).scheduler.config["prediction_type"] == "epsilon":
            return noise
        start = alpha.sqrt() / 4 * noisy / (alpha / 4 + 1 - alpha)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * start

    monkeypatch.setattr(base, "predict", predict)
    pixels = fit(open_image(couple[0]), base.size**2, base.step)
    latent = invert(base, pixels, base.encode_prompt("a cat"), 50)
    begun = base.encode_picture(pixels.values, pixels.sizes).mean[None]
    assert (latent - begun).norm() > begun.norm() / 2
    base.pipe.scheduler.set_timesteps(50)
    for t in base.pipe.scheduler.timesteps:
        out = predict(latent, t[None], [], torch.empty(0))
        latent = base.pipe.scheduler.step(out, t, latent).prev_sample
    assert (latent - begun).norm() < 1e-3 * begun.norm()


def test_a_sweep_is_one_sheet(v_base: Path, couple: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    list(
        run(
            pair_job(*couple, subject="cat", style="line", out=out, base=str(v_base), previews=0, **QUICK), device="cpu"
        )
    )
    base, styles = bases.load(str(v_base), "cpu"), StyleGuidance([Use(out / "style.safetensors")])
    sheet = sweep_sheet(
        base, "a dog", parse_sweep("style=0:6:3"), styles=styles, sampling=Sampling(steps=2, seeds=(0, 1))
    )
    cells = [sheet.crop((x, 28, x + 100, 128)).tobytes() for x in (6, 140, 274)]
    assert len(set(cells)) == 3 and sheet.width > 3 * 128 and sheet.height > 2 * 128
    for wrong in ("style", "style=0:1", "style=0:1:1", "seed=0:1:3", "style=0:nan:3", "lora=0:1:2.5"):
        with pytest.raises(UsageError, match="is no sweep"):
            parse_sweep(wrong)
    with pytest.raises(UsageError, match="nothing to vary"):
        sweep_sheet(base, "a dog", parse_sweep("lora=0:1:2"), styles=styles)


def test_frozen_rows_have_no_optimiser_state() -> None:
    """The frozen rows have no optimiser state: only the ups are in the recipe's rates."""
    (recipe,) = pair(BLOCKS["sdxl"], rank=4, steps=2, style_from=1)
    assert {part for _, part in recipe.rates} == {"up"} and all(isinstance(r, Rate) for r in recipe.rates.values())
