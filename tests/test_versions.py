"""The keys of benchmark results have versions: a change that alters a figure must raise the version that stands for it.

tests/versions.json records the results of everything that has a version. After an intended change, raise the version that the test
names, and record the new results: `RECORD=1 python -m pytest -n 0 tests/test_versions.py`.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import random_lora
from test_every_base import everything, works_elsewhere
from tiny_bases import Tiny

from unbraid.bases.base import load
from unbraid.bench import grid
from unbraid.bench.registry import chosen
from unbraid.bench.rows import version
from unbraid.bench.truth import filters
from unbraid.bench.truth.art import known_art
from unbraid.bench.truth.judge import load_judge
from unbraid.bench.truth.tasks import QUICK
from unbraid.core.lowrank import delta
from unbraid.files.lora_file import read, write
from unbraid.files.merge import Size
from unbraid.files.merge_methods import METHODS as MERGES
from unbraid.files.tools import Source, merge_files
from unbraid.methods import METHODS
from unbraid.sampling.render import Sampling, Use, render

pytestmark = pytest.mark.slow

RECORD = Path(__file__).with_name("versions.json")
Figures = dict[str, list[float]]


def of_file(file: Path) -> list[float]:
    """The length of the change, and a figure of its direction that changes with every weight in the file."""
    total = squares = 0.0
    for name, lora in read(file).modules.items():
        change = delta(lora).double()
        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        total += float((change * torch.randn(change.shape, generator=rng, dtype=torch.float64)).sum())
        squares += float(change.square().sum())
    return [squares**0.5, total / squares**0.5]


def random_file(like: Path, file: Path, seed: int) -> Path:
    """A random LoRA on the layers of another. In trained ones many weights have the same size after a few steps of Adam, so a merge that
    drops the small ones drops others on another processor."""
    shapes = {name: (len(one.up), *one.down.shape[1:]) for name, one in read(like).modules.items()}
    write(file, random_lora(shapes, seed=seed), family="sdxl", dialect="diffusers", dtype=None)
    return file


def losses(folder: Path) -> list[float]:
    """The loss of every step; empty if nothing is trained."""
    events = folder / "events.jsonl"
    return [json.loads(line)["loss"] for line in events.read_text().splitlines()] if events.exists() else []


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("versions")


@pytest.fixture(scope="module")
def made(tiny_sdxl: Tiny, picture: Path, work: Path) -> dict[str, list[Path]]:
    return everything(str(tiny_sdxl.folder), picture, work)


def test_every_method_on_sdxl(made: dict[str, list[Path]], tiny_sdxl: Tiny) -> None:
    works_elsewhere(made, tiny_sdxl, "folder", True)


@pytest.fixture(scope="module")
def found(made: dict[str, list[Path]], tiny_sdxl: Tiny, work: Path) -> dict[str, Figures]:
    """Version → the results that it stands for: losses and LoRAs of every method, brightness of drawings, scores."""
    methods = {
        method: {str(file.relative_to(work)): [*of_file(file), *losses(file.parent)] for file in sorted(files)}
        for method, files in made.items()
    }
    content, style = sorted(made["unziplora"])
    merged = {}
    sources = [Source(random_file(file, work / file.name, seed)) for seed, file in enumerate((content, style))]
    for name in MERGES:
        merge_files(sources, work / f"{name}.safetensors", name, Size())
        merged[name] = of_file(work / f"{name}.safetensors")
    base, drawn = load(str(tiny_sdxl.folder), "cpu"), {}
    for combine in ("sum", "k-lora", "switch", "composite"):
        (image,) = render(base, "a sks cat", [Use(content), Use(style)], combine=combine, sampling=Sampling(steps=2))
        drawn[combine] = (np.asarray(image).mean((0, 1)) / 255).tolist()
    art = known_art()
    shown = torch.stack([art.picture(name, "noto") for name in ("dog", "violin")])
    looks = {**filters.TRAIN_FILTERS, **filters.HELD_OUT_FILTERS}
    judge = load_judge()
    return {
        **methods,
        "merging": merged,
        "drawing": drawn,
        "filters": {name: [float(look(shown).mean()), float(look(shown).std())] for name, look in looks.items()},
        "scoring": {"judge": torch.cat([some[:, :4].flatten() for some in judge.embed(shown)]).tolist()},
    }


def test_what_changes_results_raises_a_version(found: dict[str, Figures]) -> None:
    now = {**version.versions(METHODS)}
    assert found.keys() == now.keys()
    if os.environ.get("RECORD"):
        RECORD.write_text(json.dumps({name: {"version": now[name], "figures": found[name]} for name in now}, indent=1))
    recorded = json.loads(RECORD.read_text())
    assert recorded.keys() == now.keys(), "record anew: see above"
    for name, figures in found.items():
        assert recorded[name]["version"] == now[name], f"{name}: record anew, see above"
        assert figures.keys() == recorded[name]["figures"].keys(), f"{name}: record anew, see above"
        for what, values in recorded[name]["figures"].items():
            # Between processors the weights of a trained LoRA differ by up to 2.5e-4 of its change's length; losses do not
            loose = 2 if name in METHODS else 0
            near = [pytest.approx(one, rel=1e-3, abs=1e-3 if i < loose else 1e-5) for i, one in enumerate(values)]
            assert figures[what] == near, (
                f"{name} gives other results ({what}): raise its version, and record anew (see above)"
            )


def test_a_key_knows_what_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not depend on code: moving a module or renaming a function keeps all results valid."""
    (todo,) = grid.plan(tmp_path, QUICK, chosen(("separate",), ("UnZipLoRA",)))
    key = grid.key(todo)
    row = grid._row(todo)
    monkeypatch.setattr(row.make, "__module__", "somewhere.else")
    monkeypatch.setattr(row.make, "__qualname__", "another_name")
    assert grid.key(todo) == key
    for name in ("DRAWING", "MERGING", "SCORING"):
        with monkeypatch.context() as patch:
            patch.setattr(version, name, 99)
            assert grid.key(todo) != key, name
    with monkeypatch.context() as patch:
        patch.setattr(filters, "VERSION", 99)
        assert grid.key(todo) != key
    for method in METHODS:
        with monkeypatch.context() as patch:
            patch.setitem(vars(METHODS[method]), "version", 99)
            assert (grid.key(todo) != key) == (method == "unziplora"), method
