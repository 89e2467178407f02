"""The recipe of the embedded base, at a tiny size: what it holds out, what it says, and that a kill costs nothing."""

import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from unbraid.bases.recipe import captions, config, filters, model, subjects, unet, vae

TINY = config.Config(
    32,
    config.Vae((8, 16, 16), latent=4, crop=16, batch=4, steps=6),
    config.UNet((32, 64, 64), text=32, batch=2, steps=6, warmup=2),
)


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tokenizer_folder)


def test_nothing_held_out_is_trained_on() -> None:
    held, every = set(subjects.held_out()), (*subjects.concrete(), "fire-engine", "birthday-cake")
    assert len(held) == subjects.HELD_OUT and all("-" not in name for name in held)
    for limit in (80, None):
        assert not held & set(subjects.trained(every, limit))
    assert len(subjects.trained(every, 80)) == 80 and "fire-engine" in subjects.trained(every, None)
    assert not set(subjects.TRAIN_SETS) & set(subjects.HELD_OUT_SETS)
    assert not set(filters.TRAIN_FILTERS) & set(filters.HELD_OUT_FILTERS)
    assert subjects.held_out() == tuple(sorted(random.Random(subjects.SEED).sample(subjects.concrete(), 156)))


def test_a_rare_token_is_never_in_a_caption() -> None:
    rng = random.Random(0)
    texts = [captions.caption("fire-engine", "flat", rng) for _ in range(2000)]
    assert 0.07 < texts.count("") / len(texts) < 0.13
    assert not any(rare in text.split() for rare in captions.RARE_TOKENS for text in texts)
    assert {"a fire engine in flat style", "a fire engine", "flat style"} <= set(texts)


def test_words_are_single_tokens(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("A sks Dog in line art style").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == [f"{w}</w>" for w in "a sks dog in line art style".split()]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer("naïve zebra!").input_ids.count(tokenizer.unk_token_id) == 1, "only the closing token"


@pytest.mark.parametrize(
    "one", [*filters.TRAIN_FILTERS.values(), *filters.HELD_OUT_FILTERS.values()], ids=lambda f: f.__name__
)
def test_filters_stay_in_range_and_do_something(one: filters.Filter) -> None:
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    y = one(x).expand_as(x)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1 + 1e-6 and (y - x).abs().mean() > 0.02
    assert torch.allclose(one(x[1:]).expand_as(x[1:]), y[1:], atol=1e-6), "a filter sees one picture at a time"


def test_zero_terminal_snr() -> None:
    levels = model.scheduler().alphas_cumprod
    assert levels[-1] < 1e-6 and (levels.diff() < 0).all()


def run_unet(work: Path, tokenizer: CLIPTokenizer, workers: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    work.mkdir(exist_ok=True)
    settings = replace(TINY, unet=replace(TINY.unet, batch=batch))
    data = unet.Data(
        torch.randn(3, 4, 11, 4, 8, 8, generator=torch.Generator().manual_seed(0)), ("dog", "cat", "teapot"), 32
    )
    state = unet.start_state(settings, tokenizer, work, workers, torch.device("cpu"))
    barrier = threading.Barrier(workers)
    arguments = (barrier, state, data, settings, work, tokenizer)
    others = [threading.Thread(target=unet.train, args=(rank, *arguments)) for rank in range(1, workers)]
    for thread in others:
        thread.start()
    unet.train(0, *arguments)
    for thread in others:
        thread.join()
    return load_file(work / "unet.safetensors")


def test_killed_unet_training_ends_the_same(
    tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_unet(tmp_path / "whole", tokenizer)
    assert whole["step"] == 6 and not torch.equal(whole["weights"], whole["ema"])
    monkeypatch.setattr(unet, "SAVE_EVERY", 2)
    real_draw = unet.draw

    def killed(data: unet.Data, count: int, seed: int, *rest: object) -> unet.Batch:
        if seed == 3:
            raise KeyboardInterrupt
        return real_draw(data, count, seed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(unet, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        run_unet(tmp_path / "cut", tokenizer)
    assert load_file(tmp_path / "cut" / "unet.safetensors")["step"] == 2
    monkeypatch.setattr(unet, "draw", real_draw)
    again = run_unet(tmp_path / "cut", tokenizer)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_workers_share_the_work(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """Two workers with one picture each take the step of the mean of their gradients, in shared weights."""
    two = run_unet(tmp_path / "two", tokenizer, workers=2, batch=1)
    assert two["step"] == 6 and torch.isfinite(two["weights"]).all() and two["exp_avg_sq"].min() >= 0
    moved = (two["exp_avg"] != 0).float().mean()
    assert moved > 0.9, "both halves of the weights must have been stepped"


def test_the_vae_trains_and_resumes(tmp_path: Path) -> None:
    art = np.random.default_rng(0).integers(0, 255, (3, 4, 32, 32, 3), np.uint8)
    first = vae.train(art, TINY, tmp_path, torch.device("cpu"))
    again = vae.train(art, TINY, tmp_path, torch.device("cpu"))
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs), "a finished stage is not run again"
