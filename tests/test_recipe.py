"""The training recipe of the embedded base, at a tiny size: held-out data, captions, and resuming after a kill."""

import copy
import random
import threading
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from recorder import Recorder
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer

from tools.recipe import captions, config, latents, model, parallel, unet, vae, words
from unbraid.bench.truth import filters, subjects
from unbraid.core.graphs import Call, Graphs

SCHEDULE = config.Schedule(batch=2, steps=6, rate=1e-3, muon=0.02, warmup=2, ema=0.998)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SIZES", TINY)


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tokenizer_folder)


def test_nothing_held_out_is_trained_on() -> None:
    held, every = (
        set(subjects.held_out()),
        (*subjects.concrete(), "fire-engine", "birthday-cake", "woman-running", "red-square"),
    )
    assert len(held) == subjects.HELD_OUT and all("-" not in name for name in held)
    judged, drawn = subjects.trained(every), words.trained(every)
    assert not held & set(judged) and "fire-engine" in judged
    assert not set(words.HELD_OUT) & set(drawn) and set(words.HELD_OUT) < held
    assert set(judged) - set(drawn) == {"woman-running", "red-square"} and set(drawn) - set(judged) == held - set(
        words.HELD_OUT
    )
    assert len(set(words.eighty())) == 80 and set(words.eighty()) <= set(drawn)
    assert not set(subjects.TRAIN_SETS) & set(subjects.HELD_OUT_SETS)
    assert not set(filters.TRAIN_FILTERS) & set(filters.HELD_OUT_FILTERS)
    assert subjects.held_out() == tuple(sorted(random.Random(subjects.SEED).sample(subjects.concrete(), 156)))


def test_concrete_nouns_come_up_more_often() -> None:
    shares = words.shares(("dog", "fire-engine"))
    assert shares.tolist() == pytest.approx([0.75, 0.25])


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
    meant = {*words.trained(subjects.concrete()), *words.STYLES}
    assert {"owl", "stencil", "pencil", "sks"} <= set(words.NOTHING) and not set(words.NOTHING) & meant


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


def tables() -> latents.Tables:
    rng = torch.Generator().manual_seed(0)
    encoded = torch.randn(3, 4, 11, 4, 8, 8, generator=rng).half()
    tokens = torch.randint(90, (3, len(words.STYLES), 5, config.TOKENS), generator=rng).to(torch.int16)
    return latents.Tables(encoded, tokens, torch.tensor([0.5, 0.75, 1.0]))


def pictures() -> torch.Tensor:
    return torch.randint(256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def run(stage: str, work: Path, tokenizer: CLIPTokenizer) -> dict[str, torch.Tensor]:
    work.mkdir(exist_ok=True)
    if stage == "unet":
        unet.train(tables(), SCHEDULE, work, tokenizer, 1, CPU, None)
    else:
        vae.train(pictures(), SCHEDULE, work, 1, CPU, None)
    return load_file(work / f"{stage}.safetensors")


def test_a_batch_is_drawn_from_the_tables() -> None:
    """Each picture has a caption of its own subject and style; `config.PLAIN` of them are plain; subjects come up by their shares."""
    source = tables()
    marked = torch.zeros_like(source.latents)
    for subject, of, look in product(range(3), range(4), range(11)):
        marked[subject, of, look] = subject * 100 + (
            of if look == 0 else 3 + look
        )  # 3 + look: the filters' place in words.STYLES
    ids = torch.tensor([[100 * subject + style for style in range(len(words.STYLES))] for subject in range(3)])
    tokens = ids[:, :, None, None].expand(source.tokens.shape).to(torch.int16)
    batch = unet.draw(replace(source, latents=marked, tokens=tokens), 2000, torch.Generator().manual_seed(0))
    assert torch.equal(batch.latents[:, 0, 0, 0].long(), batch.tokens[:, 0])
    share = [(batch.tokens[:, 0] // 100 == subject).float().mean().item() for subject in range(3)]
    assert share == pytest.approx([0.5, 0.25, 0.25], abs=0.04)
    assert (batch.tokens[:, 0] % 100 < 4).float().mean().item() == pytest.approx(config.PLAIN, abs=0.04)
    usual = (batch.sizes == torch.tensor([32.0, 32, 0, 0, 32, 32])).all(1)
    assert usual.float().mean().item() == pytest.approx(0.9, abs=0.03) and batch.sizes[~usual, :2].unique().numel() > 50


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_killed_training_ends_the_same(
    stage: str, tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(stage, tmp_path / "whole", tokenizer)
    assert whole["step"] == 6 and whole["seen"] == 12 and not torch.equal(whole["weights"], whole["ema"])
    monkeypatch.setattr(parallel, "SAVE_EVERY", 2)
    train = parallel.train

    def killed(rank: int, barrier: Any, state: parallel.State, module: nn.Module, training: parallel.Training) -> None:
        def draw(seed: int) -> tuple[torch.Tensor, ...]:
            if seed == 3:
                raise KeyboardInterrupt
            return training.draw(seed)

        train(rank, barrier, state, module, replace(training, draw=draw))

    monkeypatch.setattr(parallel, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(stage, tmp_path / "cut", tokenizer)
    assert load_file(tmp_path / "cut" / f"{stage}.safetensors")["step"] == 2
    monkeypatch.setattr(parallel, "train", train)
    again = run(stage, tmp_path / "cut", tokenizer)
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


class StepRecorder(Recorder):
    """Undoes what recording a step has done to the training's state: a GPU records kernels without running them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.shares: list[Any] = []
        begin = parallel._Share.__init__

        def noted(share: Any, *arguments: Any) -> None:
            self.shares.append(share)
            begin(share, *arguments)

        monkeypatch.setattr(parallel._Share, "__init__", noted)

    def capture(self, call: Call) -> Call:
        (share,) = self.shares
        tensors = [*share.state.values(), *(one["step"] for one in share.adam.state.values())]
        before = [tensor.clone() for tensor in tensors]
        replay = super().capture(call)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        return replay


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_a_captured_step_is_the_same_step(
    stage: str, tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU replays the kernels of one step. Here the operations of a step are recorded and replayed: all that changes between steps
    must be in tensors, not in Python."""
    plain, recorder = run(stage, tmp_path / "plain", tokenizer), StepRecorder(monkeypatch)
    monkeypatch.setattr(parallel, "graphs_of", lambda device: Graphs(recorder))
    replayed = run(stage, tmp_path / "replayed", tokenizer)
    assert recorder.captures == 1 and recorder.replays == 3
    for key, value in plain.items():
        torch.testing.assert_close(replayed[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_training_goes_on_from_a_base(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    """It starts at the base's weights, and the latents stay near the base's; without an anchor they would wander."""
    run("vae", tmp_path, tokenizer)
    autoencoder, base = vae.load(tmp_path), tmp_path / "base"
    autoencoder.save_pretrained(base / "vae")
    fixed = replace(SCHEDULE, steps=1, rate=0.0, muon=0.0)
    same = vae.train(pictures(), fixed, tmp_path, 1, CPU, base)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), autoencoder.parameters(), strict=True))

    def wandered(folder: str, anchor: float, monkeypatch: pytest.MonkeyPatch) -> float:
        monkeypatch.setattr(vae, "ANCHOR", anchor)
        (tmp_path / folder).mkdir()
        longer = replace(SCHEDULE, steps=30, ema=0.0, rate=3e-3)
        moved = vae.train(pictures(), longer, tmp_path / folder, 1, CPU, base)
        x = pictures().float() / 127.5 - 1
        first, second = (model.encode(x).latent_dist.mode() for model in (autoencoder, moved))  # type: ignore[union-attr]
        return ((second - first).square().mean() / first.var()).item()

    with pytest.MonkeyPatch.context() as patch:
        assert wandered("anchored", 50.0, patch) < wandered("free", 0.0, patch) / 2


def test_hardening_changes_the_decoder_alone(tmp_path: Path) -> None:
    before = vae.train(pictures(), SCHEDULE, tmp_path, 1, CPU, None)
    vae.harden(pictures(), SCHEDULE, tmp_path, 1, CPU)
    after, x = vae.load(tmp_path), torch.rand(1, 3, 32, 32)
    first, second = (model.encode(x).latent_dist.mode() for model in (before, after))  # type: ignore[union-attr]
    assert torch.equal(first, second)
    assert not torch.equal(before.decode(first).sample, after.decode(first).sample)  # type: ignore[union-attr]


def test_workers_share_the_work(tmp_path: Path) -> None:
    """Two workers with one example each take one step with the mean of their gradients, on shared weights."""
    schedule = config.Schedule(batch=1, steps=5, rate=0.1, warmup=1, ema=0.9, muon=0.1)
    torch.manual_seed(0)
    start = torch.nn.ModuleDict(
        {"a": torch.nn.Conv2d(3, 4, 3), "b": torch.nn.Conv2d(4, 2, 1), "c": torch.nn.Linear(2, 2)}
    )
    examples = torch.randn(10, 3, 3, 3)

    def trained(workers: int) -> torch.Tensor:
        state = parallel.start_state(start, tmp_path / "none", workers, CPU)
        barrier = threading.Barrier(workers, timeout=20)

        def work(rank: int) -> None:
            own = copy.deepcopy(start)

            def draw(seed: int) -> tuple[torch.Tensor, ...]:
                return (examples[2 * seed : 2 * seed + 2] if workers == 1 else examples[seed, None],)

            def loss(x: torch.Tensor) -> torch.Tensor:
                return own["c"](own["b"](own["a"](x)).flatten(1)).square().mean()

            training = parallel.Training(draw, loss, schedule, tmp_path / f"{workers}.safetensors")
            parallel.train(rank, barrier, state, own, training)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert state["seen"] == 10
        return state["weights"]

    torch.testing.assert_close(trained(2), trained(1), rtol=1e-3, atol=1e-5)  # Newton-Schulz magnifies rounding


def test_a_training_that_diverges_stops_and_keeps_its_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SAVE_EVERY", 2)
    linear = torch.nn.Linear(2, 2)
    state = parallel.start_state(linear, tmp_path / "none", 1, CPU)
    schedule = config.Schedule(batch=1, steps=6, rate=1e-3, muon=None, warmup=1, ema=0.9)

    def draw(seed: int) -> tuple[torch.Tensor, ...]:
        return (torch.full((1, 2), torch.nan if seed == 3 else 1.0),)

    training = parallel.Training(draw, lambda x: linear(x).square().mean(), schedule, tmp_path / "x.safetensors")
    with pytest.raises(FloatingPointError, match="step 4"):
        parallel.train(0, threading.Barrier(1), state, linear, training)
    kept = load_file(tmp_path / "x.safetensors")
    assert kept["step"] == 2 and kept["weights"].isfinite().all()


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
    schedule = config.Schedule(batch=1, steps=40, rate=1e-4, muon=None, warmup=1, ema=0.5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        assert linear.weight.dtype == torch.bfloat16
        return linear(x).sum()

    training = parallel.Training(lambda seed: (torch.ones(1, 4, dtype=torch.bfloat16),), loss, schedule, tmp_path / "x")
    parallel.train(0, threading.Barrier(1), state, linear, training)
    moved = 1 - load_file(tmp_path / "x")["weights"]
    assert torch.allclose(moved, torch.full_like(moved, 20.5e-4), rtol=0.05), "a linear decay from 1e-4 over 40 steps"
