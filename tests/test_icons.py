"""The embedded base as it is committed: small, loadable by stock diffusers, and able to draw what it is asked."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from unbraid.base import Base, load
from unbraid.bases.recipe.subjects import SETS, STYLE_WORDS, TRAIN_SETS
from unbraid.bases.recipe.vae import psnr
from unbraid.bench.art import held_out_art, known_art
from unbraid.bench.judge import load_judge
from unbraid.render import render

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
    assert (base.family, base.size) == ("sdxl", 64)
    names = {name for name, _ in base.unet.named_modules()}
    for block in (
        "down_blocks.1.attentions.1",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.2",
        "up_blocks.1.attentions.2",
    ):
        assert f"{block}.transformer_blocks.0.attn2.to_k" in names
    assert base.noise.config["prediction_type"] == "v_prediction" and base.noise.config["rescale_betas_zero_snr"]


def test_the_card_tells_the_truth_about_the_autoencoder(base: Base) -> None:
    """On the committed 100 of the 156 held-out subjects; the card's figures are over all."""
    said, pictures = json.loads((ICONS / "figures.json").read_text()), held_out_art().values[::3]
    for i, name in enumerate(SETS):
        assert psnr(base.vae, pictures[:, i]) == pytest.approx(said[f"psnr {name}"], abs=1.0)


def test_it_draws_what_it_is_asked(base: Base) -> None:
    """Four known subjects in four art styles: which of the four was meant, in content and in style?"""
    judge, art = load_judge(), known_art()
    truth = [judge.embed(art.values[:, i]) for i in range(len(TRAIN_SETS))]
    content = F.normalize(torch.stack([c for c, _ in truth]).mean(0), dim=1)
    style = F.normalize(torch.stack([s.mean(0) for _, s in truth]), dim=1)
    hits = []
    for subject, name in enumerate(art.names):
        for look, of in enumerate(TRAIN_SETS):
            (image,) = render(base, f"a {name} in {STYLE_WORDS[of]} style", seeds=(subject,), steps=15)
            drawn = torch.from_numpy(np.array(image, np.float32) / 255).permute(2, 0, 1)[None]
            c, s = judge.embed(drawn)
            hits.append((int((content @ c[0]).argmax()) == subject, int((style @ s[0]).argmax()) == look))
    right_content, right_style = np.mean(hits, 0)
    assert right_content >= 0.5 and right_style >= 0.5, (right_content, right_style)  # by chance 0.25
