"""The committed embedded base: it is small, stock diffusers loads it, and it draws what the prompt says."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tiny_bases import diffusion

from tools.recipe.vae import psnr
from unbraid.bases.base import Base, load
from unbraid.bench.truth.art import held_out_art, known_art
from unbraid.bench.truth.filters import TRAIN_FILTERS
from unbraid.bench.truth.judge import load_judge
from unbraid.bench.truth.subjects import SETS, STYLE_WORDS, TRAIN_SETS
from unbraid.sampling.render import Sampling, render

ICONS = Path(str(files("unbraid.bases").joinpath("icons")))


@pytest.fixture(scope="module")
def base() -> Base:
    return load("icons", "cpu")


def test_it_is_small_fp16_safetensors() -> None:
    weights = list(ICONS.rglob("*.safetensors"))
    assert len(weights) == 4 and sum(path.stat().st_size for path in weights) <= 64 * 2**20
    assert not [path for path in ICONS.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}


def test_it_has_sdxls_blocks(base: Base) -> None:
    assert (base.family.name, base.size) == ("sdxl", 128)
    names = {name for name, _ in base.denoiser.named_modules()}
    for block in (
        "down_blocks.1.attentions.1",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.2",
        "up_blocks.1.attentions.2",
    ):
        assert f"{block}.transformer_blocks.0.attn2.to_k" in names
    assert (
        diffusion(base).scheduler.config["prediction_type"] == "v_prediction"
        and diffusion(base).scheduler.config["rescale_betas_zero_snr"]
    )


@pytest.mark.slow
def test_the_card_tells_the_truth_about_the_autoencoder(base: Base) -> None:
    """On every third of the 100 held-out subjects; the card's figures are for all of them."""
    figures, pictures = json.loads((ICONS / "figures.json").read_text()), held_out_art().values[::3]
    measured = [psnr(base.vae, pictures[:, i]) for i in range(len(SETS))]
    for name, value in zip(SETS, measured, strict=True):
        assert value == pytest.approx(figures[f"psnr {name}"], abs=1.5)
    assert np.mean(measured) >= 31 and min(measured) >= 26


def top1(embedded: torch.Tensor, truth: torch.Tensor, asked: Sequence[int]) -> float:
    """How often a drawing is more similar to the truth that was asked for, an index into `truth`, than to all others."""
    return float(((embedded @ F.normalize(truth, dim=1).T).argmax(1) == torch.tensor(asked)).float().mean())


def drawn(base: Base, prompts: list[str], seed: int) -> torch.Tensor:
    images = [render(base, prompt, sampling=Sampling(seeds=(seed,), steps=15))[0] for prompt in prompts]
    return torch.stack([torch.from_numpy(np.array(image, np.float32) / 255).permute(2, 0, 1) for image in images])


@pytest.mark.slow
def test_it_draws_the_subject_that_it_is_asked_for(base: Base) -> None:
    """Every third known subject in two art styles, to be found among all 24; chance is 0.04."""
    judge, art = load_judge(), known_art()
    truth = judge.embed(art.values[:, : len(TRAIN_SETS)].flatten(0, 1))[0].unflatten(0, (-1, len(TRAIN_SETS))).mean(1)
    asked = range(0, len(art.names), 3)
    for of in TRAIN_SETS[:2]:
        content, _ = judge.embed(drawn(base, [f"a {art.names[i]} in {STYLE_WORDS[of]} style" for i in asked], 0))
        assert top1(content, truth, asked) >= 0.75


@pytest.mark.slow
def test_it_draws_in_the_style_that_it_is_asked_for(base: Base) -> None:
    """Chance is 0.25, in both kinds of styles."""
    judge, plain = load_judge(), known_art().values[:, 0]
    names = ("sepia", "night", "pastel", "blueprint")
    truth = torch.stack([judge.embed(TRAIN_FILTERS[name](plain).expand_as(plain))[1].mean(0) for name in names])
    for subject in ("dog", "strawberry"):
        _, style = judge.embed(drawn(base, [f"a {subject} in {name} style" for name in names], 0))
        assert top1(style, truth, range(len(names))) >= 0.75
