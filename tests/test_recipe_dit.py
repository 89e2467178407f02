"""`icons-dit`, the recipe's transformer, at a tiny size: its tables, resuming after a kill, and the diffusers folder."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from test_bench import count_once, draw_less
from test_bench import tiny as tiny_plan
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tools.recipe import config, dit, dit_base, latents, parallel, words
from unbraid.bases.base import load
from unbraid.bench import grid
from unbraid.bench.probe.words import draws_icons
from unbraid.bench.rows.separate import reads_own_prompts
from unbraid.sampling.sample import NEGATIVE, classifier_free, generate

SIZES = config.DitSizes(width=32, layers=2, head=16)
SCHEDULE = config.Schedule(batch=2, steps=6, rate=1e-3, muon=0.02, warmup=2, ema=0.9)
CPU = torch.device("cpu")
NAMES = ("dog", "cat", "bus", "teapot")
CAPTIONS = 5


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SIZES", TINY)


def written(work: Path, tokenizer: CLIPTokenizer) -> Path:
    """The files that the recipe's `make` leaves in its folder. A caption names its subject and its style; some are empty."""
    rng = torch.Generator().manual_seed(0)
    pictures = torch.randn(len(NAMES), 4, 11, TINY.latent, 8, 8, generator=rng).half()
    save_file({"latents": pictures, "scale": torch.ones(1)}, work / latents.FILE)
    lines = [[[f"a {name} in {style} style"] * (CAPTIONS - 1) + [""] for style in words.STYLES] for name in NAMES]
    ids = [[tokenizer(each, padding="max_length", return_tensors="pt").input_ids for each in row] for row in lines]
    tokens = torch.stack([torch.stack(row) for row in ids]).to(torch.int16)
    save_file({"tokens": tokens}, work / latents.TOKENS_FILE)
    return work


@pytest.fixture
def source(tmp_path: Path, tokenizer_folder: Path, v_base: Path) -> dit.Tables:
    """The tables of two of the four subjects."""
    work = written(tmp_path, CLIPTokenizer.from_pretrained(tokenizer_folder))
    return dit.tables(work, NAMES, v_base, ("teapot", "cat"))


def test_a_batch_has_the_texts_of_its_pictures(source: dit.Tables, tokenizer_folder: Path, v_base: Path) -> None:
    """Each caption is encoded once, and each picture gets one that names its subject and style, or the empty one."""
    assert source.texts.shape == (2 * len(words.STYLES) + 1, config.TOKENS, 64) and source.pooled.shape[1] == 96
    marked = source.pictures.latents.clone()
    for subject in range(2):
        marked[subject] = subject
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)

    def encoded(text: str) -> Tensor:
        tokens = tokenizer([text], padding="max_length", return_tensors="pt").input_ids
        return dit.encode(tokens, v_base)[0][0]

    batch = dit.draw(
        replace(source, pictures=replace(source.pictures, latents=marked)), 60, torch.Generator().manual_seed(0)
    )
    possible = {
        i: [encoded(f"a {name} in {style} style") for style in words.STYLES] for i, name in enumerate(("teapot", "cat"))
    }
    empty, count = encoded(""), 0
    for clean, text in zip(batch.latents, batch.texts, strict=True):
        if torch.allclose(text, empty, atol=1e-2):
            count += 1
        else:
            assert any(torch.allclose(text, one, atol=1e-2) for one in possible[int(clean[0, 0, 0])])
    assert 4 <= count <= 24, "a fifth of the captions are empty"
    assert batch.sigma.min() > 0 and batch.sigma.max() < 1
    assert dit.draw(source, 4000, torch.Generator().manual_seed(1)).sigma.logit().std().item() == pytest.approx(
        1, abs=0.05
    )


def test_the_loss_is_that_of_the_velocity(source: dit.Tables) -> None:
    """A model that returns the velocity has none."""

    class Right(nn.Module):
        dtype = torch.float32

        def forward(self, noisy: Tensor, texts: Tensor, pooled: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
            clean = (noisy - (t / 1000)[:, None, None, None] * batch.noise) / (1 - t / 1000)[:, None, None, None]
            return (batch.noise - clean,)

    batch = dit.draw(source, 4, torch.Generator().manual_seed(0))
    assert dit.flow_loss(Right(), batch).item() < 1e-6  # type: ignore[arg-type]


def train(source: dit.Tables, out: Path) -> dict[str, Tensor]:
    dit.train(source, SIZES, SCHEDULE, out, 1, CPU)
    return load_file(out / dit.FILE)


@pytest.mark.slow
def test_a_killed_training_ends_the_same(source: dit.Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(source, tmp_path / "whole")
    assert whole["step"] == 6 and not torch.equal(whole["weights"], whole["ema"])
    monkeypatch.setattr(parallel, "SAVE_EVERY", 2)
    usual = parallel.train

    def killed(rank: int, barrier: Any, state: parallel.State, module: nn.Module, training: parallel.Training) -> None:
        def draw(seed: int) -> tuple[Tensor, ...]:
            if seed == 3:
                raise KeyboardInterrupt
            return training.draw(seed)

        usual(rank, barrier, state, module, replace(training, draw=draw))

    monkeypatch.setattr(parallel, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        train(source, tmp_path / "cut")
    assert load_file(tmp_path / "cut" / dit.FILE)["step"] == 2
    monkeypatch.setattr(parallel, "train", usual)
    again = train(source, tmp_path / "cut")
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


@pytest.fixture
def folder(source: dit.Tables, tmp_path: Path, v_base: Path) -> Path:
    """A diffusers folder of a short training."""
    train(source, tmp_path / "state")
    out = tmp_path / "icons-dit"
    assert dit_base.save(tmp_path / "state", v_base, out, SIZES) == 12
    return out


ROWS = ("DreamBooth-LoRA", "UnZipLoRA", "B-LoRA", "direct sum", "ZipLoRA", "ZipRank", "Pair")


@pytest.mark.slow
def test_the_benchmark_runs_on_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split, B-LoRA's block split, zip, plain sum and pair, trained, drawn and judged. After three passes, both LoRAs of a split
    are drawn under the joint prompt; after a training in segments, each under its own."""
    draw_less(monkeypatch.setattr)
    count_once(monkeypatch)
    with (folder / "unbraid.toml").open("a") as settings:
        settings.write('\n[blocks]\ncontent = ["transformer_blocks.0"]\nstyle = ["transformer_blocks.1"]\n')
    todos = [todo for todo in tiny_plan(tmp_path, folder, *ROWS) if todo.cell.task != "recombine"]
    done = list(grid.run(todos))
    assert not [one.error for one in done if one.error] and {one.todo.row for one in done} == set(ROWS)
    assert not reads_own_prompts("unziplora", {}, joint=True) and reads_own_prompts(
        "unziplora", {"segments": True}, joint=True
    )


@pytest.mark.slow
def test_the_folder_is_a_base(folder: Path, source: dit.Tables, v_base: Path) -> None:
    """unbraid recognises the folder, encodes prompts as they were encoded in training, and draws what SD3's pipeline draws."""
    base = load(str(folder), "cpu")
    assert (base.family.name, base.size, base.step) == ("sd3", 32, 8)
    prompt = base.encode_prompt("a cat in flat style")
    tokens = base.pipe.tokenizer(["a cat in flat style"], padding="max_length", return_tensors="pt").input_ids
    texts, pooled = dit.encode(tokens, v_base)
    torch.testing.assert_close(prompt.embeds, texts[0].float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(prompt.pooled, pooled[0].float(), rtol=1e-2, atol=1e-2)
    encoded = {"main": prompt, NEGATIVE: base.encode_negative()}
    (ours,) = generate(base, classifier_free(4.0, "main"), encoded, seeds=(0,), steps=3)
    stock: Any = dit_base.saved(folder)
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 32, "width": 32}
    theirs = stock("a cat in flat style", **given, **dit_base.NO_T5, generator=torch.Generator().manual_seed(0)).images[
        0
    ]
    assert np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).max() <= 1
    assert not base.family.network.remarks(base.pipe, ["a cat"]) and len(
        base.family.network.remarks(base.pipe, ["cat " * 30])
    )
    assert draws_icons(str(folder)), "so that probe-blocks asks the judge"
    assert json.loads((folder / "images.json").read_text()) == {"images": 12} and (folder / "unbraid.toml").exists()
    assert set(dit_base.subject_gain(folder, source, ("teapot", "cat"))) == set(dit_base.PROBES)


@pytest.mark.slow
def test_the_command_trains_on_the_eighty_subjects(tmp_path: Path) -> None:
    """At its real size, for one step, from files as `make` leaves them."""
    names, styles = words.eighty(), len(words.STYLES)
    (tmp_path / "names.json").write_text(json.dumps(names))
    np.save(tmp_path / "art128.npy", np.zeros(1))
    save_file({"latents": torch.randn(len(names), 4, 11, 16, 16, 16).half()}, tmp_path / latents.FILE)
    tokens = torch.randint(90, (len(names), styles, 1, config.TOKENS)).to(torch.int16)
    save_file({"tokens": tokens}, tmp_path / latents.TOKENS_FILE)
    command = [sys.executable, "-m", "tools.recipe", "dit", "--work", str(tmp_path), "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-500:]
    assert load_file(tmp_path / "dit" / dit.FILE)["seen"] == config.DIT_SCHEDULE.batch


def test_the_card_states_the_figures(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    save_file({"a": torch.zeros(1_500_000)}, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "images.json").write_text('{"images": 1234}')
    words.write(words.eighty(), tmp_path)
    parts = ("content all", "style all", "content art", "style art", "content filter", "style filter")
    parts += tuple(f"{key} {word}" for word in words.STYLES for key in ("content in", "style"))
    figures = {f"{kind} {part}": 0.25 for kind in ("drawn", "real") for part in parts} | {"drawn content all": 0.5}
    figures["drawn style noir"] = float("nan")  # no prompt asked for it
    dit_base.write(figures, 200, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert (
        "| all | 50% | 25% | 25% | 25% |" in card
        and "1.5 M parameters" in card
        and "1,234 images of 80 subjects" in card
        and "from 200 drawings" in card
        and "| noir | 25% | – |" in card
    )
    assert json.loads((tmp_path / "figures.json").read_text())["drawn content all"] == 0.5
