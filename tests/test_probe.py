"""`unbraid probe-blocks`: swapping the prompt in single blocks, on tiny random bases and on the embedded one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_transformers as tiny
import torch
from tiny_models import save_clip, save_dino
from typer.testing import CliRunner

from unbraid.bases import base as bases
from unbraid.bases.base import Base
from unbraid.bench.field.models import FieldModels, load_models
from unbraid.bench.probe import report
from unbraid.bench.probe.loras import LoraPlan, probe_loras
from unbraid.bench.probe.measure import Effect, Eyes, Plan, Row, eyes, probe
from unbraid.bench.probe.swap import drawn, groups
from unbraid.cli.main import app
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.selectors import chosen, open_blocks, selects
from unbraid.files.lora_file import write
from unbraid.runs import run as running
from unbraid.runs.api import split_job
from unbraid.sampling.render import Sampling, Use, render
from unbraid.sampling.sample import NEGATIVE

HOW: dict[str, Any] = {"guidance": 3.0, "steps": 3, "seeds": (0, 1)}
QUICK = Sampling(steps=2)
PLAN = Plan(("cat", "dog"), ("ink", "flat"), pairs=1, seeds=1, steps=2)


def pixels(base: Base, prompts: Any, swapped: Any = ()) -> np.ndarray:
    return np.stack([np.asarray(one).astype(int) for one in drawn(base, prompts, swapped, **HOW)])


def check_swaps(base: Base) -> None:
    """A swap in all groups is the other text under the pooled vector of the plain one; a swap of equal prompts changes nothing;
    a swap in one group is neither."""
    found = {"main": base.encode_prompt("a cat in ink"), "other": base.encode_prompt("a big dog, flat")}
    prompts = base.alike({**found, NEGATIVE: base.encode_negative()})
    names = [name for some in groups(base) for name in some]
    plain, every = pixels(base, prompts), pixels(base, prompts, names)
    other = {**prompts, "main": replace(prompts["other"], pooled=prompts["main"].pooled)}
    assert np.abs(every - pixels(base, other)).max() <= 1 < np.abs(every - plain).max()
    assert np.abs(pixels(base, {**prompts, "other": prompts["main"]}, names[:1]) - plain).max() <= 1
    single = pixels(base, prompts, names[1:2])
    assert np.abs(single - plain).max() > 1 and np.abs(single - every).max() > 1
    assert not base.denoiser.get_submodule(names[1])._forward_pre_hooks


def test_swaps_in_a_unet(v_base: Path) -> None:
    check_swaps(bases.load(str(v_base), "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("make", (tiny.flux, tiny.sd35))
def test_swaps_in_joint_attention(make: Any, tmp_path: Path) -> None:
    base = bases.load(str(tiny.save(make(), tmp_path / "base")), "cpu")
    check_swaps(base)
    singles = ["single_transformer_blocks.0", "single_transformer_blocks.1"] if base.family.name == "flux" else []
    assert [name for some in groups(base) for name in some] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
        *singles,
    ]
    assert len(groups(base, size=3)) == 1 + bool(singles)  # neighbours of one kind only


def test_neighbours_are_swapped_together_and_are_a_range(v_base: Path) -> None:
    base = bases.load(str(v_base), "cpu")
    every, none = [name for some in groups(base) for name in some], Effect(0.0, 0.0, 0.0)
    for some in groups(base, size=2):
        selector = report.label(Row(some, none, none, none, ""))
        assert [name for name in every if selects([selector], name)] == list(some)


def test_what_all_groups_change_is_everything_where_nothing_is_pooled(sd15_base: Path) -> None:
    base = bases.load(str(sd15_base), "cpu")
    looking = eyes(replace_name(base), FieldModels())
    *progress, rows = probe(base, looking, PLAN)
    assert isinstance(rows, list) and progress[-1] == (2 * (len(rows) + 2), 2 * (len(rows) + 2))
    assert rows[0].content.mean == pytest.approx(1, abs=0.02) and rows[0].style.mean == pytest.approx(1, abs=0.02)
    assert all(row.content.low <= row.content.mean <= row.content.high and row.role == "" for row in rows)
    assert len({row.content.mean for row in rows}) > 2
    blind = Eyes(lambda some: looking.content([some[0].point(lambda value: 0)] * len(some)), looking.style, {})
    with pytest.raises(UsageError, match="do not change the content"):
        list(probe(base, blind, PLAN))


def replace_name(base: Base) -> Base:
    return replace(base, name="icons")


def row(name: str, lead: float, spread: float) -> Row:
    effect = Effect(lead, lead - spread, lead + spread)
    role = "content" if effect.low > 0 else "style" if effect.high < 0 else ""
    return Row((name,), effect, Effect(0.0, -0.1, 0.1), effect, role)


def test_roles_are_those_with_confidence_else_the_nearest(tmp_path: Path) -> None:
    rows = [row("all", 0.0, 1.0), row("up_blocks.0.attentions.0", 0.3, 0.1), row("up_blocks.0.attentions.1", -0.1, 0.2)]
    rows.append(row("up_blocks.0.attentions.2", -0.05, 0.2))
    files = report.write(rows, "some/base", {"content": "DINO", "style": "CSD"}, PLAN, tmp_path)
    assert [file.name for file in files] == ["blocks.json", "blocks.png", "roles.toml"]
    blocks = open_blocks(str(files[2]))
    assert blocks == {"content": ("up_blocks.0.attentions.0",), "style": ("up_blocks.0.attentions.1",)}
    assert "no group is style" in files[2].read_text()
    table = json.loads(files[0].read_text())
    assert [one["selector"] for one in table["groups"]] == [one.modules[0] for one in rows[1:]]
    assert table["plan"]["prompts"][0]["style"] == ["a cat in ink style", "a cat in flat style"]


def test_who_looks(v_base: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    base = bases.load(str(v_base), "cpu")
    dino = str(save_dino(tmp_path / "dino"))
    for models in (FieldModels(), load_models(dino=dino)):
        with pytest.raises(UsageError, match="the judge sees only"):
            eyes(base, models)
    clip = str(save_clip(tmp_path / "clip", tokenizer_folder))
    looking = eyes(base, load_models(clip=clip, dino=dino))
    assert looking.names["content"].startswith("DINO") and looking.names["style"].startswith("CLIP-I")
    *_, rows = probe(base, looking, PLAN)
    assert isinstance(rows, list) and len(rows) == 1 + len(groups(base))
    with pytest.raises(UsageError, match="two subjects and two styles"):
        list(probe(base, looking, replace(PLAN, styles=("ink",))))


@pytest.mark.slow
def test_z_image_is_refused(tmp_path: Path) -> None:
    base = bases.load(str(tiny.save(tiny.z_image(), tmp_path / "base")), "cpu")
    with pytest.raises(UsageError, match="as one sequence"):
        groups(base)


def random_lora(base: Base, path: Path, seed: int, prompt: str) -> Path:
    """A LoRA of random numbers on the attention of a base."""
    adapters = Adapters.attach(base.denoiser, kinds=base.family.network.layers)
    adapters.new("lora", 2, torch.Generator().manual_seed(seed), up_std=0.3)
    part = base.family.network.part
    modules = {f"{part}.{name}": lora for name, lora in adapters.folded("lora").items()}
    adapters.detach()
    words = {"unbraid.prompt": prompt} if prompt else {}
    write(path, modules, family=base.family.name, dialect="diffusers", metadata=words, dtype=None)
    return path


def two_loras(base: Base, folder: Path, prompts: tuple[str, str] = ("a sks cat", "a sks dog")) -> LoraPlan:
    folder.mkdir(exist_ok=True)
    files = [str(random_lora(base, folder / f"{i}.safetensors", i, text)) for i, text in enumerate(prompts)]
    return LoraPlan(files, pairs=1, seeds=1, steps=2)


def check_swapped_loras(base: Base, folder: Path) -> None:
    """All groups have the second LoRA: the picture of that LoRA alone. One group: neither picture."""
    plan, seen = two_loras(base, folder), list[np.ndarray]()

    def look(some: Any) -> torch.Tensor:
        seen.append(np.stack([np.asarray(one).astype(int) for one in some]))
        flat = torch.from_numpy(seen[-1]).flatten(1).double()
        return flat / flat.norm(dim=1, keepdim=True)

    before = {key: value.clone() for key, value in base.denoiser.state_dict().items()}
    *progress, rows = probe_loras(base, Eyes(look, look, {"content": "pixels", "style": "pixels"}), plan)
    assert isinstance(rows, list) and progress[-1] == (len(rows) + 2, len(rows) + 2)
    begin, other, *_ = seen
    every, *single = seen[4::2]  # both roles look at the same pictures
    alone = [
        np.stack([np.asarray(one).astype(int) for one in render(base, "a sks cat", [Use(Path(file))], sampling=QUICK)])
        for file in plan.files
    ]
    assert np.array_equal(begin, alone[0]) and np.array_equal(other, alone[1]) and np.array_equal(every, other)
    assert np.abs(begin - other).max() > 1 and all(np.abs(one - other).max() > 0 for one in single)
    assert sum(np.abs(one - begin).max() > 0 for one in single) == len(single)
    assert rows[0].content.mean == pytest.approx(1) == rows[0].style.mean
    after = base.denoiser.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_swapped_loras_in_a_unet(sd15_base: Path, tmp_path: Path) -> None:
    check_swapped_loras(bases.load(str(sd15_base), "cpu"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("make", (tiny.flux, tiny.sd35, tiny.z_image))
def test_swapped_loras_in_transformers(make: Any, tmp_path: Path) -> None:
    """On Z-Image as well, whose blocks do not get the text as an argument."""
    check_swapped_loras(bases.load(str(tiny.save(make(), tmp_path / "base")), "cpu"), tmp_path / "loras")


def test_which_lora_is_swapped_under_which_prompt(sd15_base: Path, tmp_path: Path) -> None:
    base = bases.load(str(sd15_base), "cpu")
    plan = two_loras(base, tmp_path)
    assert [plan.pair(i) for i in range(2)] == [
        {"prompt": "a sks cat", "begin": "0.safetensors", "other": "1.safetensors"},
        {"prompt": "a sks dog", "begin": "1.safetensors", "other": "0.safetensors"},
    ]
    assert [replace(plan, prompts=("a", "b", "c")).prompt(i) for i in range(4)] == ["a", "b", "c", "a"]
    looking = eyes(replace_name(base), FieldModels())
    same = replace(plan, files=(plan.files[0], plan.files[0]))
    with pytest.raises(UsageError, match="the LoRAs do not change the content"):
        list(probe_loras(base, looking, same))
    with pytest.raises(UsageError, match="1 LoRAs"):
        list(probe_loras(base, looking, replace(plan, files=plan.files[:1])))
    silent = two_loras(base, tmp_path / "silent", ("", ""))
    with pytest.raises(UsageError, match="records no prompt"):
        list(probe_loras(base, looking, silent))


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--lora", "a.safetensors"], "1 LoRAs"),
        (["--lora", "a", "--lora", "b", "--subject", "cat"], "words are not swapped"),
        (["--prompt", "a cat"], "goes with two LoRAs"),
        (["--pairs", "0"], "a number below 1"),
    ],
)
def test_options_that_do_not_go_together(more: list[str], what: str) -> None:
    made = CliRunner().invoke(app, ["probe-blocks", "icons", *more])
    assert made.exit_code and what in str(made.exception or made.output)


def test_files_are_looked_at_before_a_base_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "load", lambda *_: pytest.fail("a base was loaded"))
    words = ["--lora", str(tmp_path / "a.safetensors"), "--lora", str(tmp_path / "b.safetensors")]
    for more in ([], ["--prompt", "a cat"]):
        made = CliRunner().invoke(app, ["probe-blocks", "icons", *words, *more])
        assert made.exit_code and "a.safetensors" in str(made.exception or made.output)


@pytest.mark.slow
def test_the_command_with_two_loras(tmp_path: Path) -> None:
    out, plan = tmp_path / "blocks", two_loras(bases.load("icons", "cpu"), tmp_path / "loras")
    given = ["--pairs", "1", "--seeds", "1", "--steps", "2", "--size", "4", "--out", str(out), "--quiet"]
    loras = [word for file in plan.files for word in ("--lora", file)]
    made = CliRunner().invoke(app, ["probe-blocks", *given, *loras], catch_exceptions=False)
    assert made.exit_code == 0 and made.output.split()[-1].endswith("roles.toml")
    assert "swapping the LoRAs 0.safetensors and 1.safetensors" in (out / "roles.toml").read_text()
    table = json.loads((out / "blocks.json").read_text())
    assert table["plan"]["prompts"] == [plan.pair(0)] and open_blocks(str(out / "roles.toml"))["content"]


@pytest.mark.slow
def test_the_command_on_the_embedded_base_and_a_split_with_its_roles(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "blocks"
    given = ["probe-blocks", "--pairs", "1", "--seeds", "1", "--steps", "2", "--out", str(out), "--quiet"]
    made = CliRunner().invoke(app, given, catch_exceptions=False)
    assert made.exit_code == 0 and made.output.split()[-1].endswith("roles.toml")
    assert (out / "blocks.png").stat().st_size > 1000
    blocks = open_blocks(str(out / "roles.toml"))
    job = split_job(
        picture, subject="cat", style="ink", method="blora", blocks=out / "roles.toml", steps=1, rank=2, previews=0,
        out=tmp_path / "run",
    )  # fmt: skip
    list(running.run(job, device="cpu"))
    layers = [line.split()[1] for line in (job.out / "blocks.txt").read_text().splitlines()]
    assert all(chosen(blocks, layers, "here").values())
