"""ZipLoRA, compared with its dense definition, and `unbraid zip` on a tiny base."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.speed.published import dense_sum, published
from unbraid.bases.base import Base, Picture, RunData, load
from unbraid.bases.families import BLOCKS
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import UsageError
from unbraid.core import mergers
from unbraid.core.adapters import Adapters
from unbraid.core.graphs import Graphs
from unbraid.core.lora import Factors, Lora, Noise
from unbraid.core.lowrank import delta
from unbraid.core.recipe import Sample, Shared
from unbraid.core.state import State
from unbraid.core.train import precomputed_targets, train
from unbraid.files.lora_file import read, write
from unbraid.files.tools import Source, merge_files
from unbraid.methods.ziplora import excess, ziplora
from unbraid.runs.api import zip_job
from unbraid.runs.run import run
from unbraid.sampling.attach import attach

ROLES = ("content", "style")


@pytest.fixture
def run_data(v_model: Base) -> Iterator[RunData]:
    """RunData on a small SDXL with four transformer blocks; a hundred steps take a few seconds."""
    torch.manual_seed(0)
    fewer = {"layers_per_block": 1, "block_out_channels": (32, 64), "transformer_layers_per_block": (1, 1)}
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    heads = {"attention_head_dim": v_model.denoiser.config["attention_head_dim"][:2]}
    v_model.pipe.unet = UNet2DConditionModel.from_config({**v_model.denoiser.config, **fewer, **kinds, **heads})
    rng = torch.Generator().manual_seed(1)
    v_model.denoiser.double()
    pictures = {
        role: [
            Picture(torch.randn(4, 8, 8, generator=rng).double(), torch.zeros(4, 8, 8).double(), torch.full((6,), 32.0))
        ]
        for role in ROLES
    }
    prompts = {
        role: Prompt(torch.randn(24, 64, generator=rng).double(), torch.randn(64, generator=rng).double())
        for role in ROLES
    }
    yield RunData(v_model, pictures, prompts)


def two_loras(model: Base, disjoint: bool = False, ranks: tuple[int, int] = (3, 4)) -> Adapters:
    adapters, rng = Adapters.attach(model.denoiser), torch.Generator().manual_seed(2)
    for i, role in enumerate(ROLES):
        made = {}
        for j, (name, layer) in enumerate(adapters.layers.items()):
            if disjoint and j % 2 == i:
                continue
            d, k = layer.base.weight.shape
            down = torch.randn(ranks[i], k, generator=rng).double() / k**0.5
            made[name] = Factors(down, torch.randn(d, ranks[i], generator=rng).double() / 3, 0.5 + i)
        adapters.add(role, made)
    return adapters


def zipped(
    run_data: RunData, adapters: Adapters, steps: int, at_once: int = 2, cached: bool = False, **settings: object
) -> State:
    settings = {"granularity": "column", **settings}
    (recipe,) = ziplora(BLOCKS["sdxl"], steps=steps, **settings)  # type: ignore[arg-type]
    state = State.fresh(adapters, recipe, torch.Generator().manual_seed(0))
    ahead = precomputed_targets(run_data, recipe, adapters, state.rng, at_once=3) if cached else None
    for _ in train(run_data, recipe, state, at_once, ahead):
        pass
    return state


@pytest.mark.slow
def test_factorised_equals_dense_over_100_steps(run_data: RunData) -> None:
    adapters = two_loras(run_data.base)
    (recipe,) = ziplora(BLOCKS["sdxl"], steps=100, granularity="column")
    recipe.prepare(adapters, torch.Generator())
    loop = published(run_data.base, lambda: run_data.pictures, run_data.encoded, recipe, adapters, dense_sum)
    for _ in islice(loop, 100):
        pass
    loop.close()
    expected = [tuple(one.columns.detach() for one in layer.adapters.values()) for layer in adapters.layers.values()]  # type: ignore[union-attr]
    zipped(run_data, adapters, 100)
    got = [tuple(one.columns for one in layer.adapters.values()) for layer in adapters.layers.values()]  # type: ignore[union-attr]
    moved = 0.0
    for (a, b), (c, d) in zip(got, expected, strict=True):
        assert (a - c).abs().max() < 1e-8 and (b - d).abs().max() < 1e-8  # type: ignore[operator]
        moved = max(moved, float((c - 1).abs().max()))
    assert moved > 0.1, "at the paper's rate the coefficients must really move"


COARSE = ("mid_block", "up_blocks.0")  # the small model has two levels


def test_the_layer_prior_is_its_formula(run_data: RunData) -> None:
    """Σ over layers of low resolution of max(0, Σ|m_style| − Σ|m_content|), also for packed layers; only they get gradients,
    and only where the style has more."""
    adapters, rng = two_loras(run_data.base, ranks=(4, 4)), torch.Generator().manual_seed(5)
    (recipe,) = ziplora(BLOCKS["sdxl"], steps=1)
    recipe.prepare(adapters, rng)
    wanted, ahead = 0.0, {}
    for name, layer in adapters.layers.items():
        content, style = (one.ranks for one in layer.factors().values())
        assert content is not None and style is not None
        content.data, style.data = (torch.randn(4, generator=rng).double() for _ in range(2))
        more = float(style.detach().abs().sum() - content.detach().abs().sum())
        ahead[name] = name.startswith(COARSE) and more > 0
        wanted += more if ahead[name] else 0.0
    assert 0 < sum(ahead.values()) < len(ahead)
    assert excess(adapters, COARSE).item() == pytest.approx(wanted, rel=1e-12)
    excess(adapters, COARSE).backward()
    for name, layer in adapters.layers.items():
        found = [one.ranks.grad for one in layer.factors().values() if one.ranks is not None]
        assert all(
            one is not None and bool(one.any()) == ahead[name] for one in found if ahead[name] or one is not None
        )
    adapters.pack()
    assert excess(adapters, COARSE).item() == pytest.approx(wanted, rel=1e-12)
    assert excess(adapters, ("elsewhere",)).item() == 0


def test_the_layer_prior_keeps_the_content_ahead_where_it_belongs(run_data: RunData) -> None:
    """It changes a training, and lowers what it measures. A base without known levels is refused."""
    found = {}
    for weight in (0.0, 10.0):
        adapters = two_loras(run_data.base, ranks=(4, 4))
        zipped(run_data, adapters, 6, granularity="rank", lr=0.05, layer_prior=weight)
        found[weight] = excess(adapters, COARSE).item()
        adapters.detach()
    assert found[10.0] < found[0.0]
    with pytest.raises(UsageError, match="low resolution"):
        ziplora(BLOCKS["flux"], layer_prior=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("shared_noise", [True, False])
def test_teachers_asked_ahead_say_the_same(run_data: RunData, shared_noise: bool) -> None:
    found = []
    for at_once, cached in ((1, False), (2, True)):
        adapters = two_loras(run_data.base)
        zipped(run_data, adapters, 10, at_once, cached, shared_noise=shared_noise)
        found.append([one.columns for role in ROLES for one in adapters.of(role).values()])
        adapters.detach()
    for live, ahead in zip(*found, strict=True):
        assert (live - ahead).abs().max() < 1e-10 and (live != 1).any()  # type: ignore[operator]


@pytest.mark.parametrize("granularity", ["column", "rank", "row", "layer"])
def test_coefficients_fold_exactly(run_data: RunData, granularity: str) -> None:
    adapters = two_loras(run_data.base, ranks=(3, 3))
    zipped(run_data, adapters, 2, granularity=granularity)
    for layer in adapters.layers.values():
        for one in layer.adapters.values():
            assert isinstance(one, Factors)
            (merger,) = one.mergers()
            size = {"column": one.down.shape[1], "rank": len(one.down), "row": len(one.up), "layer": 1}
            assert len(merger) == size[granularity] and (merger != 1).any()
            left = merger[:, None] if granularity in ("row", "layer") else 1
            middle = torch.diag(merger) if granularity == "rank" else torch.eye(len(one.down)).double()
            right = merger if granularity == "column" else 1
            dense = left * (one.scale * one.up @ middle @ one.down) * right
            assert torch.allclose(delta(one.folded()), dense, atol=1e-12)


def test_the_cosine_does_not_pull_at_the_start_and_the_others_do(run_data: RunData) -> None:
    adapters = two_loras(run_data.base)
    for similarity, pulls in (("cos", False), ("dot", True), ("product", True)):
        (recipe,) = ziplora(BLOCKS["sdxl"], similarity=similarity, granularity="column")  # type: ignore[arg-type]
        recipe.prepare(adapters, torch.Generator())
        assert recipe.hooks.penalty
        penalty = recipe.hooks.penalty(adapters, 0)
        assert penalty is not None
        penalty.backward()
        gradient = max(float(one.columns.grad.abs().max()) for one in adapters.of("content").values())  # type: ignore[union-attr]
        assert (gradient > 1e-6) is pulls, similarity


@pytest.mark.parametrize("ranks", [(3, 3), (3, 4)])
def test_the_default_is_per_rank_and_per_column_where_ranks_differ(run_data: RunData, ranks: tuple[int, int]) -> None:
    adapters = two_loras(run_data.base, ranks=ranks)
    (recipe,) = ziplora(BLOCKS["sdxl"])
    recipe.prepare(adapters, torch.Generator())
    for role in ROLES:
        for one in adapters.of(role).values():
            assert len(one.mergers()[0]) == (3 if ranks == (3, 3) else one.down.shape[1])


class Toy(nn.Module):
    """A Denoiser with six residual layers, wide enough for the kinds of similarity to differ."""

    WIDTH = 64
    prompts: Mapping[str, Tensor] = {}
    graphs: Graphs | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(self.WIDTH, self.WIDTH) for _ in range(6))

    def constants(self) -> Sequence[Tensor]:
        return ()

    def x0_factor(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def draw(
        self, images: Sequence[str], shared: frozenset[Shared], rng: torch.Generator, noises: Sequence[Noise] = ()
    ) -> list[Sample]:
        zero = torch.zeros(1)
        made = [torch.randn(1, 16, self.WIDTH, generator=rng) + (role == "style") for role in images]
        return [Sample(one, zero, zero.expand_as(one), zero) for one in made]

    def predict(self, samples: Sequence[Sample], prompts: Sequence[str]) -> Tensor:
        x = torch.cat([sample.noisy for sample in samples])
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / 2
        return x


@pytest.mark.slow
def test_collapse_is_seen() -> None:
    """The raw dot product shrinks both LoRAs in the same way, the cosine does not, and the public recipe changes nothing."""
    found = {}
    for name, settings in {
        "dot": {"similarity": "dot", "weight": 0.1},
        "cos": {},
        "official": {"compat": "official"},
    }.items():
        toy, rng = Toy(), torch.Generator().manual_seed(1)
        adapters = Adapters.attach_named(toy, [f"layers.{i}" for i in range(6)])
        for role in ROLES:
            adapters.new(role, 8, rng, up_std=0.1)
        (recipe,) = ziplora({}, **{"granularity": "column", **settings})  # type: ignore[arg-type]
        for _ in train(toy, recipe, State.fresh(adapters, recipe, rng), 2):
            pass
        found[name] = mergers.summary(adapters)
    assert mergers.collapsed(found["dot"]), found["dot"]
    assert not mergers.collapsed(found["cos"]) and found["cos"]["cos"] < 0.95
    assert all(found["official"][f"mean {role}"] > 0.994 for role in ROLES), "5e-5 · 100 steps moves by 0.005 at most"


def test_what_only_one_has_keeps_its_strength(run_data: RunData) -> None:
    adapters = two_loras(run_data.base)
    lonely = next(iter(adapters.layers))
    del adapters.layers[lonely].adapters["style"]
    zipped(run_data, adapters, 3)
    assert adapters.of("content")[lonely].mergers() == []
    adapters.detach()
    with pytest.raises(UsageError, match="no layer in common"):
        zipped(run_data, two_loras(run_data.base, disjoint=True), 3)


def test_it_stops_when_the_coefficients_are_apart(run_data: RunData) -> None:
    state = zipped(run_data, two_loras(run_data.base), 100, weight=1.0, tolerance=0.9)
    (recipe,) = ziplora(BLOCKS["sdxl"])
    assert state.step == recipe.steps and mergers.summary(state.adapters)["cos"] < 0.9
    steps = {float(value["step"]) for value in state.optimizer.state.values()}
    assert max(steps) < 100


def make(path: Path, base: Base, seed: int, rank: int, dialect: str, prompt: str = "") -> Path:
    rng = torch.Generator().manual_seed(seed)
    modules = {}
    for name, layer in base.denoiser.named_modules():
        if type(layer).__name__ == "Linear" and ".attn" in name:
            d, k = layer.weight.shape
            down, up = torch.randn(rank, k, generator=rng) / k**0.5, torch.randn(d, rank, generator=rng) / 4
            modules[f"unet.{name}"] = Lora(down, up, rank / 2)
    metadata = {"unbraid.prompt": prompt} if prompt else {}
    write(path, modules, family="sdxl", dialect=dialect, metadata=metadata)  # type: ignore[arg-type]
    return path


@pytest.mark.slow
def test_zip_makes_two_files_that_every_tool_reads(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """Without pictures for the style, with a picture for the content; the files contain what was trained."""
    base = load(str(v_base), "cpu")
    content = make(tmp_path / "a.safetensors", base, 0, 4, "kohya", "a sks cat")
    style = make(tmp_path / "b.safetensors", base, 1, 3, "diffusers", "a cat in line style")
    out = tmp_path / "run"
    options = {"out": out, "base": str(v_base), "previews": 1, "steps": 8}
    job = zip_job(content, style, images={"content": picture}, **options)
    events = list(run(job, device="cpu"))
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"content.safetensors", "style.safetensors", "coefficients.png", "sheet.png", "drawn/style_0.png"} <= names
    assert not any(name.startswith("drawn/content") for name in names) and not any(e.warning for e in events)
    steps = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert len(steps) == 8 and steps[-1]["mean content"] != 1 and 0 < steps[-1]["cos"] <= 1
    for name, source in (("content", content), ("style", style)):
        before, after = read(source).modules, read(out / f"{name}.safetensors").modules
        assert before.keys() == after.keys()
        moved = 0.0
        for module, one in before.items():
            old, new = delta(one).double(), delta(after[module]).double()
            ratio = (old * new).sum(0) / old.square().sum(0)
            assert (new - old * ratio).norm() < 1e-3 * new.norm(), "one factor per column"
            moved = max(moved, float((ratio - 1).abs().max()))
        assert moved > 0.01
    options["out"] = tmp_path / "one"
    single = list(run(zip_job(content, style, images={"content": picture}, single=True, **options), device="cpu"))
    (merged,) = [event.file for event in single if event.file and event.file.suffix == ".safetensors"]
    both = [read(out / f"{name}.safetensors").modules for name in ROLES]
    for module, one in read(merged).modules.items():
        assert len(one.down) == 7
        assert torch.allclose(delta(one), sum(delta(half[module]) for half in both), atol=2e-3)  # type: ignore[arg-type]


def test_np_lora_is_the_merge_in_two_files(v_base: Path, tmp_path: Path) -> None:
    """Nothing is trained or drawn. The sum of the two files equals the file that `merge --method np-lora` writes."""
    base = load(str(v_base), "cpu")
    files = [make(tmp_path / f"{i}.safetensors", base, i, 4, "kohya", "a cat") for i in range(2)]
    out = tmp_path / "run"
    job = zip_job(*files, method="np-lora", base=str(v_base), out=out, previews=0)
    assert not [event for event in run(job, device="cpu") if event.step]
    assert {path.name for path in out.iterdir()} == {
        "run.toml",
        "events.jsonl",
        "content.safetensors",
        "style.safetensors",
    }
    merge_files([Source(file) for file in files], tmp_path / "one.safetensors", "np-lora")
    merged = read(tmp_path / "one.safetensors").modules
    content, style = (read(out / f"{role}.safetensors").modules for role in ROLES)
    for name, one in read(files[1]).modules.items():
        assert torch.allclose(delta(style[name]), delta(one), atol=1e-3), "the style is left as it is"
        assert torch.allclose(delta(content[name]) + delta(style[name]), delta(merged[name]), atol=4e-3)
    before = read(files[0]).modules
    assert all((delta(content[name]) - delta(one)).norm() > 0.02 * delta(one).norm() for name, one in before.items())


@pytest.mark.slow
def test_a_killed_zip_ends_the_same(
    v_base: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    base = load(str(v_base), "cpu")
    files = [make(tmp_path / f"{i}.safetensors", base, i, 4, "kohya", "a cat") for i in range(2)]
    monkeypatch.setattr("unbraid.runs.pace.SAVE_EVERY", 0.0)
    results = []
    for name, cut in (("whole", None), ("cut", 5)):
        options = {"out": tmp_path / name, "base": str(v_base), "previews": 0, "steps": 8}
        events: Any = run(zip_job(*files, **options), device="cpu")
        for i, _ in enumerate(events):
            if i == cut:
                break
        events.close()  # releases the lock on the folder
        if cut:
            list(run(zip_job(*files, **options), resume=True, device="cpu"))
        results.append(load_file(tmp_path / name / "style.safetensors"))
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_bad_input_is_one_clear_line(v_base: Path, sd15_base: Path, tmp_path: Path) -> None:
    base, other = load(str(v_base), "cpu"), load(str(sd15_base), "cpu")
    good = make(tmp_path / "good.safetensors", base, 0, 4, "kohya", "a cat")
    unlabelled = make(tmp_path / "silent.safetensors", base, 1, 4, "kohya")
    foreign = make(tmp_path / "foreign.safetensors", other, 1, 4, "kohya", "a cat")
    with pytest.raises(UsageError, match="records no prompt"):
        zip_job(good, unlabelled)
    with pytest.raises(UsageError, match=r"made for SD1|made for SDXL|wrong shapes"):
        list(run(zip_job(good, foreign, base=str(v_base), out=tmp_path / "x"), device="cpu"))
    with pytest.raises(UsageError):
        zip_job(good, tmp_path / "missing.safetensors")
    assert not (tmp_path / "x").exists()
    assert attach(base, {"a": (good, read(good).modules)})
