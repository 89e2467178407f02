"""The training recipe of the embedded base, at a tiny size: held-out data, captions, and resuming after a kill."""

import copy
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tools.recipe import captions, config, model, parallel, unet, vae
from unbraid.bench.truth import filters, subjects

TINY = config.Config(
    32,
    config.Vae((8, 16, 16), latent=4, crop=16, batch=4, steps=6, hardening=4),
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


def test_captions_name_what_is_drawn_or_say_nothing() -> None:
    """One caption in ten is empty. Some have a meaningless word in place of the subject or style, or as a name of the subject."""
    rng = random.Random(0)
    texts = [captions.caption("fire-engine", "flat", rng, ("owl", "line art")) for _ in range(4000)]
    assert 0.07 < texts.count("") / len(texts) < 0.13
    assert {"a fire engine in flat style", "a fire engine", "flat style"} <= set(texts)
    assert {"a sks fire engine in flat style", "a owl in flat style", "a fire engine in line art style"} <= set(texts)
    with_text = [text for text in texts if text]
    assert (
        0.75
        < sum(not {"owl", "sks", "monadikos", "unb", "art"} & set(text.split()) for text in with_text) / len(with_text)
        < 0.85
    )


def test_words_that_stand_for_nothing_are_never_trained_with_a_meaning() -> None:
    every = subjects.trained(subjects.concrete(), None)
    meant = {*every, *filters.TRAIN_FILTERS, *(subjects.STYLE_WORDS[name] for name in subjects.TRAIN_SETS)}
    assert {"owl", "stencil", "pencil", "sks"} <= set(unet.nothing()) and not set(unet.nothing()) & meant


def test_a_tokenizer_that_is_there_stays(tmp_path: Path) -> None:
    """The trainer of the tokenizer breaks ties at random, so a new one would give words other numbers than the UNet has learnt."""
    captions.train_tokenizer(("dog", "cat"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    captions.train_tokenizer(("dog", "teapot"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and "vocab.json" in before


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


def data() -> unet.Data:
    latents = torch.randn(3, 4, 11, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return unet.Data(latents, ("dog", "cat", "teapot"), 32)


def art() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (3, 4, 32, 32, 3), np.uint8)


def run(stage: str, work: Path, tokenizer: CLIPTokenizer) -> dict[str, torch.Tensor]:
    work.mkdir(exist_ok=True)
    if stage == "unet":
        unet.train(data(), TINY, work, tokenizer, 1, torch.device("cpu"))
    else:
        vae.train(art(), TINY, work, 1, torch.device("cpu"))
    return load_file(work / f"{stage}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_killed_training_ends_the_same(
    stage: str, tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(stage, tmp_path / "whole", tokenizer)
    assert (
        whole["step"] == 6
        and whole["seen"] == {"vae": 21, "unet": 12}[stage]
        and not torch.equal(whole["weights"], whole["ema"])
    )
    monkeypatch.setattr(parallel, "SAVE_EVERY", 2)
    module, name = (unet, "draw") if stage == "unet" else (vae, "batch")
    real = getattr(module, name)

    def killed(*arguments: object) -> object:
        if arguments[2 if stage == "unet" else 3] == 3:  # the seed of step 3
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        run(stage, tmp_path / "cut", tokenizer)
    assert load_file(tmp_path / "cut" / f"{stage}.safetensors")["step"] == 2
    monkeypatch.setattr(module, name, real)
    again = run(stage, tmp_path / "cut", tokenizer)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_hardening_changes_the_decoder_alone(tmp_path: Path) -> None:
    device = torch.device("cpu")
    before = vae.train(art(), TINY, tmp_path, 1, device)
    vae.harden(art(), TINY, tmp_path, 1, device)
    after, x = vae.load(TINY, tmp_path), torch.rand(1, 3, 32, 32)
    first, second = (model.encode(x).latent_dist.mode() for model in (before, after))  # type: ignore[union-attr]
    assert torch.equal(first, second)
    assert not torch.equal(before.decode(first).sample, after.decode(first).sample)  # type: ignore[union-attr]


def test_workers_share_the_work(tmp_path: Path) -> None:
    """Two workers with one example each take one step with the mean of their gradients, on shared weights."""
    schedule = parallel.Schedule("toy", steps=5, rate=0.1, warmup=1, ema=0.9, muon=0.1)
    torch.manual_seed(0)
    start = torch.nn.ModuleDict(
        {"a": torch.nn.Conv2d(3, 4, 3), "b": torch.nn.Conv2d(4, 2, 1), "c": torch.nn.Linear(2, 2)}
    )
    examples = torch.randn(10, 3, 3, 3)

    def trained(workers: int) -> torch.Tensor:
        state = parallel.start_state(start, tmp_path / "none", workers, torch.device("cpu"))
        barrier = threading.Barrier(workers, timeout=20)

        def work(rank: int) -> None:
            own = copy.deepcopy(start)

            def loss(step: int, seed: int) -> tuple[torch.Tensor, int]:
                x = examples[2 * step : 2 * step + 2] if workers == 1 else examples[seed, None]
                return own["c"](own["b"](own["a"](x)).flatten(1)).square().mean(), len(x)

            parallel.train(rank, barrier, state, own, loss, schedule, tmp_path / f"{workers}.safetensors")

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert state["seen"] == 10
        return state["weights"]

    torch.testing.assert_close(trained(2), trained(1), rtol=1e-3, atol=1e-5)  # Newton-Schulz magnifies rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_steps_are_near_orthogonal(dtype: torch.dtype) -> None:
    for shape in ((3, 8, 20), (3, 20, 8)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        values = torch.linalg.svdvals(parallel.orthogonal(matrices).float())
        assert values.min() > 0.6 and values.max() < 1.3


def test_half_precision_keeps_full_precision_weights(tmp_path: Path) -> None:
    """Steps far below the resolution of bfloat16 must add up, because the master copy is float32."""
    linear, device = torch.nn.Linear(4, 4, bias=False), torch.device("cpu")
    torch.nn.init.ones_(linear.weight)
    state = parallel.start_state(linear, tmp_path / "x", 1, device, torch.bfloat16)
    schedule = parallel.Schedule("x", 40, 1e-4, 1, 0.5)

    def loss(step: int, seed: int) -> tuple[torch.Tensor, int]:
        assert linear.weight.dtype == torch.bfloat16
        return linear(torch.ones(1, 4, dtype=torch.bfloat16)).sum(), 1

    parallel.train(0, threading.Barrier(1), state, linear, loss, schedule, tmp_path / "x")
    moved = 1 - load_file(tmp_path / "x")["weights"]
    assert torch.allclose(moved, torch.full_like(moved, 20.5e-4), rtol=0.05), "a linear decay from 1e-4 over 40 steps"
