"""Break-for-Make: separated blocks, matching modules, and an optimiser that does not depend on how ΔW is factored."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TO_Q
from double import in_double
from PIL import Image
from torch import Tensor, nn

from unbraid.bases import base as bases
from unbraid.bases.base import Base, Picture, RunData
from unbraid.bases.families import BLOCKS
from unbraid.bases.families.family import Prompt
from unbraid.common.errors import LONGEST, UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.graphs import Graphs
from unbraid.core.lora import Active, Branch, Factors, Fixed, Lora, Noise
from unbraid.core.lowrank import delta
from unbraid.core.optim import Rate, Riemannian
from unbraid.core.recipe import Denoiser, Recipe, Sample, Shared, Stop
from unbraid.core.state import State
from unbraid.core.train import train
from unbraid.files.lora_file import read, write
from unbraid.methods.b4m import Cut, break_
from unbraid.runs.api import learn_job
from unbraid.runs.break_make import break_job, join, make_job, matrix, together
from unbraid.runs.break_make import make as api_make
from unbraid.runs.break_make import opened as opened_module
from unbraid.runs.run import run

QUICK: dict[str, Any] = {"rank": 4, "steps": 4, "lr": 1e-2, "partner_lr": 1e-2, "partner_count": 1, "previews": 0}


def run_data(base: Base) -> RunData:
    rng = torch.Generator().manual_seed(1)
    base.denoiser.double()
    zeros = torch.zeros(4, 4, 4).double()
    images = {
        role: [Picture(torch.randn(4, 4, 4, generator=rng).double(), zeros, torch.full((6,), 32.0))]
        for role in ("own", "partner1")
    }
    prompt = Prompt(torch.randn(24, 64, generator=rng).double(), torch.randn(64, generator=rng).double())
    return RunData(base, images, {"both": prompt})


def begun(base: Base, **settings: Any) -> tuple[Adapters, Recipe, State]:
    adapters = Adapters.attach(base.denoiser)
    (recipe,) = break_(BLOCKS["sdxl"], **{"rank": 4, "partner_count": 1, "lr": 1e-2, "partner_lr": 1e-2, **settings})
    state = State.fresh(adapters, in_double(recipe), torch.Generator().manual_seed(0))
    return adapters, recipe, state


def parts(adapters: Adapters) -> list[Factors]:
    return list(adapters.of("module").values())


@pytest.mark.slow
@pytest.mark.parametrize("halves", ["heads", "first"])
@pytest.mark.parametrize("split", [0.5, 0.25])
@pytest.mark.parametrize("interaction", [False, True])
def test_nothing_changes_at_the_start_and_everything_can(
    v_model: Base, halves: str, split: float, interaction: bool
) -> None:
    settings = {"halves": halves, "split": split, "interaction": interaction}
    adapters, recipe, _ = begun(v_model, steps=1, compat="official", **settings)
    for one in parts(adapters):
        assert isinstance(one.fixed, Fixed) and not (one.fixed.up @ one.fixed.down).any(), (
            "the frozen halves do not meet"
        )
        down, up = one.plain()
        assert not (up @ down).any()
        for gram, there in (
            (one.fixed.up.T @ one.fixed.up, [1, 1, 0, 0]),
            (one.fixed.down @ one.fixed.down.T, [0, 0, 1, 1]),
        ):
            assert (gram - torch.diag(torch.tensor(there).double())).abs().max() < 1e-6
    model = run_data(v_model)
    samples = model.draw(["own"], frozenset(), torch.Generator().manual_seed(0))
    with adapters.activate([recipe.branches(0)[0].active], model.prompts):
        model.predict(samples, ["both"]).square().mean().backward()
    live = {name: one for name, one in adapters.of("module").items() if "to_q" not in name and "to_k" not in name}
    for one in live.values():  # (the deepest level has one position, so attention there has no gradient)
        assert one.gradient("down").any() and one.gradient("up").any()


def test_halves_spread_over_heads() -> None:
    frozen = Cut(4, 0.5, "heads", False, True).frozen(64)
    assert frozen.sum() == 32 and all(head.sum() == 4 for head in frozen.split(8))
    assert Cut(4, 0.25, "heads", False, True).frozen(64).sum() == 16
    assert Cut(4, 0.5, "first", False, True).frozen(64)[:32].all()


def test_every_shape_of_sdxl_is_cut() -> None:
    """Square and other layers, at rank 64. The published code left the others out."""
    cut = Cut(64, 0.5, "heads", False, True)
    for d, k in ((1280, 1280), (1280, 2048), (640, 640), (640, 2048)):
        (layer,) = Adapters.attach_named(nn.Sequential(nn.Linear(k, d)), ["0"]).layers.values()
        fixed = cut.fixed(layer)
        assert fixed.rows.sum() == d // 2 and fixed.columns.sum() == k // 2
        assert torch.linalg.matrix_rank(fixed.up) == torch.linalg.matrix_rank(fixed.down) == 32


class Alone:
    """A denoiser for which one role gives no gradient, because its predictions equal its targets."""

    graphs: Graphs | None = None

    def __init__(self, real: RunData, silent: str) -> None:
        self.real, self.prompts, self.silent, self.roles = real, real.prompts, silent, [""]

    def constants(self) -> Sequence[Tensor]:
        return self.real.constants()

    def x0_factor(self, t: Tensor) -> Tensor:
        return self.real.x0_factor(t)

    def draw(
        self, images: Sequence[str], shared: frozenset[Shared], rng: torch.Generator, noises: Sequence[Noise] = ()
    ) -> list[Sample]:
        self.roles = list(images)
        return self.real.draw(images, shared, rng, noises)

    def predict(self, samples: Sequence[Sample], prompts: Sequence[str]) -> Tensor:
        out = self.real.predict(samples, prompts)
        quiet = torch.tensor([role == self.silent for role in self.roles])[:, None, None, None]
        return torch.where(quiet, out.detach(), out)


@pytest.mark.parametrize("kind", ["content", "style"])
def test_each_picture_trains_its_own_factor_and_the_frozen_halves_stay(v_model: Base, kind: str) -> None:
    """The loss on the module's own picture does not change the other factor, bit for bit, and the partners' loss not its own."""
    for quiet in ("own", "partner1"):
        adapters, recipe, state = begun(v_model, kind=kind, steps=5)
        before = [(one.fixed.down.clone(), one.fixed.up.clone()) for one in parts(adapters) if one.fixed]
        for _, _ in zip(range(4), train(Alone(run_data(v_model), quiet), recipe, state, at_once=2), strict=False):
            pass  # without the last step, which discards the partners' factor
        moved = {
            "down": any(one.down.any() for one in parts(adapters)),
            "up": any(one.up.any() for one in parts(adapters)),
        }
        own = "down" if kind == "content" else "up"
        assert [part for part, did in moved.items() if did] == [
            part for part in ("down", "up") if (part == own) == (quiet == "partner1")
        ]
        for one, (down, up) in zip(parts(adapters), before, strict=True):
            assert one.fixed and torch.equal(one.fixed.down, down) and torch.equal(one.fixed.up, up)
            full_down, full_up = one.plain()
            frozen = one.fixed.columns == 0, one.fixed.rows == 0
            assert torch.equal(full_down[:, frozen[0]], down[:, frozen[0]])
            assert torch.equal(full_up[frozen[1]], up[frozen[1]])
        adapters.detach()


@pytest.fixture(scope="module")
def modules(v_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Modules of two contents and a style, and of a style with interaction."""
    folder = tmp_path_factory.mktemp("modules")
    for name, colour in (("fox", "orange"), ("cat", "grey"), ("ink", "black")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")
    for kind, text in (("content", "a teapot"), ("style", "a teapot in red style")):
        (folder / kind).mkdir()
        Image.new("RGB", (32, 32), "red").save(folder / kind / "a.png")
        (folder / kind / "a.txt").write_text(text)
    out = {"folder": folder}
    for name, kind, prompt, more in (
        ("fox", "content", "a sks fox", {}),
        ("cat", "content", "a sks cat", {}),
        ("ink", "style", "a cat in ink style", {}),
        ("met", "style", "a cat in ink style", {"interaction": True}),
    ):
        image = folder / f"{name if name != 'met' else 'ink'}.png"
        partners = folder / ("style" if kind == "content" else "content")
        options = {**QUICK, "base": str(v_base), "out": folder / name, **more}
        job = break_job(image, kind=kind, prompt=prompt, partners=partners, **options)  # type: ignore[arg-type]
        list(run(job, device="cpu"))
        out[name] = folder / name / "module.safetensors"
    return out


@pytest.mark.slow
def test_putting_together_is_the_sum_and_nothing_is_trained(modules: dict[str, Path], tmp_path: Path) -> None:
    file = join(modules["fox"], modules["ink"].parent, tmp_path / "merged.safetensors")
    fox, ink, both = (read(path).modules for path in (modules["fox"], modules["ink"], file))
    assert read(file).metadata["unbraid.prompt"] == "a sks fox in ink style"
    for name, one in both.items():
        content, style = delta(fox[name]), delta(ink[name])
        assert content.any() and style.any()
        assert torch.allclose(delta(one), content + style, atol=1e-7)
        assert not (content != 0).any(1)[(style != 0).any(1)].any(), "they write to different outputs"


@pytest.mark.slow
def test_fine_tuning_starts_from_the_graft_in_every_layer(
    modules: dict[str, Path], v_base: Path, tmp_path: Path
) -> None:
    joined = read(join(modules["fox"], modules["ink"], tmp_path / "now.safetensors")).modules
    images = {"content": modules["folder"] / "fox.png", "style": modules["folder"] / "ink.png"}
    options: dict[str, Any] = {"base": str(v_base), "previews": 0, "every": 2, "images": images}
    for lr, metric in ((0.0, "riemannian"), (0.0, "euclidean"), (1e-3, "riemannian")):
        out = tmp_path / f"{metric}-{lr}"
        more: dict[str, Any] = {"out": out, "lr": lr, "metric": metric, **options}
        job = make_job(modules["fox"], modules["ink"], fine_tune=3, **more)
        list(run(job, device="cpu"))
        tuned = read(out / "merged.safetensors").modules
        assert tuned.keys() == joined.keys()
        same = [torch.allclose(delta(tuned[name]), delta(joined[name]), atol=2e-5) for name in joined]
        assert all(same) if not lr else not all(same)


def test_making_fine_tunes_by_default_where_there_are_pictures(
    modules: dict[str, Path], v_base: Path, tmp_path: Path
) -> None:
    """Pictures are for nothing else; without them nothing is trained."""
    config = tmp_path / "few.toml"
    config.write_text("[make]\nfine_tune = 2\n")
    images = {"content": modules["folder"] / "fox.png", "style": modules["folder"] / "ink.png"}
    both = modules["fox"], modules["ink"]
    assert api_make(*both, out=tmp_path / "now") == tmp_path / "now" / "merged.safetensors"
    assert not (tmp_path / "now" / "run.toml").exists()
    options: dict[str, Any] = {"base": str(v_base), "previews": 0, "images": images, "config": config}
    file = api_make(*both, out=tmp_path / "tuned", **options)
    assert read(file).metadata["ss_steps"] == "2"
    assert not (api_make(*both, out=tmp_path / "none", fine_tune=0, **options).with_name("run.toml")).exists()


@pytest.mark.slow
def test_a_matrix_is_every_content_in_every_style(modules: dict[str, Path], v_base: Path, tmp_path: Path) -> None:
    made = list(matrix([modules["fox"], modules["cat"]], [modules["ink"]], tmp_path, base=str(v_base)))
    assert [file.name for file in made] == ["fox+ink.safetensors", "cat+ink.safetensors", "matrix.png"]
    assert all(file.exists() for file in made)


def test_the_joint_prompt(modules: dict[str, Path]) -> None:
    fox, ink = (opened_module(modules[name]) for name in ("fox", "ink"))
    assert together(fox, ink) == "a sks fox in ink style" and together(ink, fox) == "a cat in ink style, a sks fox"


GOOD = {"kind": "content", "rank": 4, "split": 0.5, "halves": "heads", "interaction": False, "orthogonal": True}


@pytest.mark.parametrize(
    ("settings", "base", "what"),
    [
        ("{", "icons", "not a module"),
        ("[1]", "icons", "not a module"),
        ("9" * 5000, "icons", "not a module"),
        ("[" * 50_000, "icons", "not a module"),
        (json.dumps({"kind": ["content"]}), "icons", "not a module"),
        (json.dumps({"kind": "content"}), "icons", "does not record its rank"),
        (json.dumps(GOOD), "", "does not record its base"),
        (json.dumps({**GOOD, "rank": "x"}), "icons", "wrong setting"),
        (json.dumps({**GOOD, "rank": [4]}), "icons", "wrong setting"),
        (json.dumps({**GOOD, "rank": -4}), "icons", "out of range"),
        (json.dumps({**GOOD, "split": float("nan")}), "icons", "no number"),
        (json.dumps({**GOOD, "halves": "last"}), "icons", "wrong setting"),
    ],
)
def test_what_a_module_records_is_checked(settings: str, base: str, what: str, tmp_path: Path) -> None:
    module = Lora(torch.ones(4, 8), torch.ones(8, 4), 4.0)
    metadata = {"unbraid.method": "break", "unbraid.settings": settings, "unbraid.prompt": "a cat"}
    file = tmp_path / "m.safetensors"
    write(
        file,
        {TO_Q: module},
        family="sdxl",
        metadata=metadata | ({"unbraid.base": base} if base else {}),
    )
    with pytest.raises(UsageError, match=what) as caught:
        opened_module(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= LONGEST and "m.safetensors" in str(caught.value)


@pytest.mark.slow
def test_bad_modules_are_one_clear_line(modules: dict[str, Path], v_base: Path, eps_base: Path, tmp_path: Path) -> None:
    folder = modules["folder"]
    options: dict[str, Any] = {**QUICK, "base": str(v_base), "kind": "style", "prompt": "a cat in ink style"}
    for name, more in {"other": {"base": str(eps_base)}, "rank": {"rank": 2}, "split": {"split": 0.25}}.items():
        given = {**options, **more, "partners": folder / "content", "steps": 1}
        list(run(break_job(folder / "ink.png", out=tmp_path / name, **given), device="cpu"))
    list(
        run(
            learn_job(
                folder / "ink.png", prompt="x", base=str(v_base), out=tmp_path / "learnt", rank=2, steps=1, previews=0
            ),
            device="cpu",
        )
    )
    out = tmp_path / "x.safetensors"
    cases = [
        ((modules["fox"], tmp_path / "other"), "modules of different bases"),
        ((modules["fox"], tmp_path / "rank"), "modules of different rank, 4 and 2"),
        ((modules["fox"], tmp_path / "split"), "modules of different split, 0.5 and 0.25"),
        ((modules["fox"], modules["met"]), "modules of different interaction"),
        ((modules["fox"], modules["fox"]), "the same module twice"),
        ((modules["fox"], modules["cat"]), "this is a content module"),
        ((tmp_path / "learnt" / "lora.safetensors", modules["ink"]), "this is not a module"),
    ]
    for pair, what in cases:
        with pytest.raises(UsageError, match=what):
            join(*pair, out)
    assert not out.exists()
    with pytest.raises(UsageError, match="1 partner images, 3 at every step"):
        break_job(folder / "ink.png", kind="style", prompt="x", base=str(v_base), partners=folder / "content")
    with pytest.raises(UsageError, match="without a prompt of its own"):
        given = {"kind": "style", "prompt": "x", "base": str(v_base), "out": tmp_path / "bad"}
        break_job(folder / "ink.png", partners=folder, **given)
    for key, value, what in (("rank", 3, "cannot be halved"), ("split", 1.0, "a split of 1.0")):
        with pytest.raises(UsageError, match=what):
            given = {**options, key: value, "partners": folder / "content", "out": tmp_path / "bad"}
            list(run(break_job(folder / "ink.png", **given), device="cpu"))


def product(scale: float, way: str, steps: int = 20) -> tuple[Tensor, list[float]]:
    """Fit B A to a matrix, starting from (c B, A / c)."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(12, 3, generator=rng).double() @ torch.randn(3, 10, generator=rng).double()
    down, up = torch.randn(3, 10, generator=rng).double(), torch.randn(12, 3, generator=rng).double() * 0.1
    one = Factors(down / scale, up * scale)
    optimizer = Riemannian([one], 0.05, 1e-6) if way == "riemannian" else torch.optim.AdamW(one.parameters(), 0.05)
    losses = []
    for _ in range(steps):
        loss = (one.up @ one.down - truth).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return (one.up @ one.down).detach(), losses


def test_the_preconditioned_step_does_not_mind_how_a_product_is_shared_out() -> None:
    for way, alike in (("riemannian", True), ("adamw", False)):
        (plain, losses), (shared, _) = product(1.0, way), product(100.0, way)
        assert losses[-1] < losses[0]
        assert bool((plain - shared).abs().max() < 1e-8 * plain.abs().max()) is alike
    assert product(100.0, "riemannian")[1][-1] < 0.5 * product(100.0, "adamw")[1][-1], (
        "badly scaled, it is the faster one"
    )


class Bowl(nn.Module):
    """A denoiser with one trained number: as it grows, the validation loss falls and then rises."""

    prompts: Mapping[str, Tensor] = {}
    graphs: Graphs | None = None

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.line.weight)

    def constants(self) -> Sequence[Tensor]:
        return ()

    def x0_factor(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def draw(
        self, images: Sequence[str], shared: frozenset[Shared], rng: torch.Generator, noises: Sequence[Noise] = ()
    ) -> list[Sample]:
        goal = {"train": 3.0, "valid": 1.0}
        return [
            Sample(torch.ones(1, 1), torch.zeros(1), torch.full((1, 1), goal[one]), torch.zeros(1, 6)) for one in images
        ]

    def predict(self, samples: Sequence[Sample], prompts: Sequence[str]) -> Tensor:
        return self.line(torch.cat([sample.noisy for sample in samples]))


def stopped(resume_at: int | None = None) -> tuple[State, list[int]]:
    model = Bowl()
    assert isinstance(model, Denoiser)
    adapters, active = Adapters.attach_named(model, ["line"]), (Active("a"),)
    recipe = Recipe(
        lambda adapters, rng: adapters.new("a", 1, rng),
        lambda step: (Branch("train", "x", active),),
        {("a", "down"): Rate(0.05), ("a", "up"): Rate(0.05)},
        200,
        stop=Stop((Branch("valid", "x", active),), 5, 3),
    )
    state = State.fresh(adapters, recipe, torch.Generator().manual_seed(0))
    seen = []
    for step in train(model, recipe, state):
        seen.append(step.index)
        if step.index == resume_at:
            saved = state.tensors()
            state.restore({key: value.clone() for key, value in saved.items()})
    return state, seen


def test_early_stopping_keeps_the_best() -> None:
    state, seen = stopped()
    assert 10 < len(seen) < 190 and state.least < 0.1
    (lora,) = state.adapters.folded("a").values()
    assert abs(float(lora.up @ lora.down) - 1) < 0.35, "not what the training picture wants, 3"
    again, also = stopped(resume_at=10)
    assert also == seen and again.least == state.least


def test_the_embedded_base_takes_modules() -> None:
    """A module has every attention layer of the base, square ones and others."""
    adapters, cut = Adapters.attach(bases.load("icons", "cpu").denoiser), Cut(8, 0.5, "heads", False, True)
    assert len({d == k for d, k in (layer.base.weight.shape for layer in adapters.layers.values())}) == 2
    for layer in adapters.layers.values():
        down, up = cut.fresh(layer).plain()
        assert down.any() and up.any() and not (up @ down).any()
