"""Which layers serve content and style: selectors, published tables, and files of roles, in `split` and `merge`."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_transformers import REAL
from test_uses import modules
from typer.testing import CliRunner

import unbraid
from unbraid.bases.base import Base
from unbraid.bases.families import BLOCKS, FAMILIES
from unbraid.cli.main import app
from unbraid.common.errors import UsageError
from unbraid.core.adapters import Adapters
from unbraid.core.layers import ATTENTION
from unbraid.core.lora import Lora
from unbraid.core.lowrank import delta
from unbraid.core.selectors import ROLES, TABLES, USUAL, Blocks, chosen, groups_of, open_blocks, selects
from unbraid.files.lora_file import LoraFile, read, write
from unbraid.files.scaling import of_role
from unbraid.files.tools import Source, edit, merge_files
from unbraid.runs import run as running
from unbraid.runs.api import split_job
from unbraid.runs.batch import recorded as job_of
from unbraid.runs.folder import RECORD
from unbraid.runs.roles import in_role, in_roles, roles_in_drawing
from unbraid.sampling.uses import Use

GROUPS = [
    f"{side}_blocks.{i}.attentions.{j}"
    for side, i, n in (("down", 1, 2), ("down", 2, 2), ("up", 0, 3), ("up", 1, 3))
    for j in range(n)
]

FILE = """
content = ["up_blocks.0.attentions.2", "down_blocks.*.attentions.1.transformer_blocks.0.attn1"]
style = ["unet.mid_block"]
"""


def test_selectors_compare_whole_parts() -> None:
    assert selects(["transformer_blocks.0"], "transformer_blocks.0.attn.to_q")
    assert selects(["transformer_blocks.0"], "transformer.transformer_blocks.0")
    for other in ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.01.attn", "transformer_blocks.10.attn"):
        assert not selects(["transformer_blocks.0"], other)
    assert [
        i for i in range(40) if selects(["single_transformer_blocks.10-37"], f"single_transformer_blocks.{i}.attn")
    ] == [*range(10, 38)]
    assert selects(["up_blocks.*.attentions.1"], "unet.up_blocks.2.attentions.1.proj_in")
    assert not selects(["up_blocks.*.attentions.1"], "up_blocks.2.attentions.10.proj_in")
    for wrong in ("up_blocks.0.", "up blocks.0", "up_blocks.9-2", "", "a.(b|c)", "blocks.1-", "٣"):
        with pytest.raises(UsageError):
            selects([wrong], "up_blocks.0")


@pytest.mark.parametrize("name", TABLES)
def test_published_tables_select_layers_of_the_published_models(name: str) -> None:
    table = TABLES[name]
    network = next(family.network for family in FAMILIES if family.name == table.family)
    if table.family == "flux":
        layers = list(Adapters.attach(network.empty(REAL["flux"]), ATTENTION, network.layers).layers)
    else:
        groups = ["down_blocks.1.attentions.1", *(f"up_blocks.{i}.attentions.{j}" for i in range(2) for j in range(3))]
        layers = [f"{group}.transformer_blocks.0.attn1.to_q" for group in groups]
    found = chosen(open_blocks(name), layers, name)
    assert {role: len(groups_of(some)) for role, some in found.items()} == {
        "b-lora": {"content": 1, "style": 1},
        "unziplora": {"content": 2, "style": 4},
        "splitflux": {"content": 10, "style": 28},
        "b-lora-flux": {"content": 8, "style": 2},
        "icons": {"content": 2, "style": 3},
    }[name]


def test_faults_are_said_in_one_line(tmp_path: Path) -> None:
    layers = ["up_blocks.0.attentions.0.to_q", "up_blocks.0.attentions.1.to_q"]
    with pytest.raises(UsageError, match=r"selects no layer.*up_blocks.0.attentions.1"):
        chosen({"content": ("up_blocks.0.attentions.3",), "style": ()}, layers, "here")
    with pytest.raises(UsageError, match="is in content and in style"):
        chosen({"content": ("up_blocks.0.attentions.0",), "style": ("up_blocks",)}, layers, "here")
    with pytest.raises(UsageError, match="no such table"):
        open_blocks("b-lorra")
    file = tmp_path / "roles.toml"
    for text in ("content = 3", 'content = ["a"]\nstyle = []', 'content = ["a"]\nstyle = ["b."]', FILE + "colour = 1"):
        file.write_text(text)
        with pytest.raises(UsageError):
            open_blocks(str(file))


def test_a_file_of_roles_says_where_blora_trains(v_base: Path, picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "roles.toml"
    file.write_text(FILE)
    given: dict[str, Any] = {
        "subject": "cat",
        "style": "ink",
        "base": str(v_base),
        "rank": 2,
        "steps": 2,
        "previews": 0,
    }
    job = split_job(picture, **given, method="blora", blocks=file, lr=1e-2, out=tmp_path / "run")
    notes = [event.note for event in running.run(job, device="cpu") if event.note]
    recorded = [line.split() for line in (job.out / "blocks.txt").read_text().splitlines()]
    for role in ("content", "style"):
        modules = read(job.out / f"{role}.safetensors").modules
        assert modules and all(selects(open_blocks(str(file))[role], name) for name in modules)
        assert {f"unet.{name}" for kind, name in recorded if kind == role} == modules.keys()
        assert any(note.startswith(f"{role}: {len(modules)} layers") for note in notes)
    again = job_of(job.out / RECORD)
    assert again.data.training == job.data.training and again.data.training.blocks == open_blocks(str(file))
    with pytest.raises(UsageError, match="selects no layer"):
        list(running.run(split_job(picture, **given, blocks="splitflux", out=tmp_path / "other"), device="cpu"))
    with pytest.raises(UsageError, match="treats all layers alike"):
        split_job(picture, **given, method="qr-split", blocks="b-lora")


def test_the_default_is_as_before(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """B-LoRA has one group for each role, and `--blocks b-lora` is the same."""
    given: dict[str, Any] = {
        "subject": "cat",
        "style": "ink",
        "base": str(v_base),
        "rank": 2,
        "steps": 1,
        "previews": 0,
    }
    files = []
    for name in ("", "b-lora"):
        job = split_job(picture, **given, method="blora", lr=1e-2, blocks=name, out=tmp_path / f"run{name}")
        list(running.run(job, device="cpu"))
        files.append({role: read(job.out / f"{role}.safetensors").modules for role in ("content", "style")})
        assert (job.out / "blocks.txt").exists() == bool(name)
    for role in ("content", "style"):
        assert all(name.startswith(f"unet.{TABLES['b-lora'].blocks[role][0]}.") for name in files[0][role])
        assert all(torch.equal(files[0][role][name].up, files[1][role][name].up) for name in files[0][role])
    assert BLOCKS["sdxl"]["content"] == TABLES["unziplora"].blocks["content"]


def test_a_base_can_state_its_roles(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """They count for methods that have roles, where the user gives none."""
    base = shutil.copytree(v_base, tmp_path / "base")
    (base / "unbraid.toml").write_text(f"[blocks]\n{FILE}")
    given: dict[str, Any] = {"subject": "cat", "style": "ink", "base": str(base)}
    stated = open_blocks(str(written(tmp_path, FILE)))
    for method in ("blora", "unziplora"):
        assert split_job(picture, **given, method=method).data.training.blocks == stated
    assert split_job(picture, **given, method="blora", blocks="b-lora").data.training.blocks == TABLES["b-lora"].blocks
    assert not split_job(picture, **given, block_separation=False).data.training.blocks
    assert not split_job(picture, **given, method="qr-split").data.training.blocks
    (base / "unbraid.toml").write_text("[blocks]\ncontent = 3")
    with pytest.raises(UsageError, match="content is no list of selectors"):
        split_job(picture, **given, method="blora")


def written(folder: Path, text: str) -> Path:
    file = folder / "roles.toml"
    file.write_text(text)
    return file


def test_merge_takes_roles(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    names = [f"single_transformer_blocks.{i}.attn.to_q" for i in (0, 1, 10)] + ["transformer_blocks.0.attn.to_q"]
    sources = []
    for label in ("first", "second"):
        modules = {
            f"transformer.{name}": Lora(torch.randn(2, 8, generator=rng), torch.randn(8, 2, generator=rng), 2.0)
            for name in names
        }
        path = tmp_path / f"{label}.safetensors"
        write(path, modules, family="flux", dialect="diffusers", metadata={}, dtype=None)
        sources.append(Source(path))
    first, second = (read(source.path).modules for source in sources)
    file = tmp_path / "roles.toml"
    file.write_text('content = ["single_transformer_blocks.0-1"]\nstyle = ["transformer_blocks.0"]\nsource = "a test"')
    done = merge_files(sources, tmp_path / "out.safetensors", "blocks", blocks=open_blocks(str(file)))
    made = read(done.path).modules
    assert set(made) == {f"transformer.{name}" for name in (*names[:2], names[3])}
    assert torch.equal(made[f"transformer.{names[0]}"].up, first[f"transformer.{names[0]}"].up)
    assert torch.equal(made[f"transformer.{names[3]}"].up, second[f"transformer.{names[3]}"].up)
    assert done.matched == {
        "content": tuple(f"transformer.{n}" for n in names[:2]),
        "style": (f"transformer.{names[3]}",),
    }
    whole = merge_files(sources, tmp_path / "roles.safetensors", "roles", blocks=open_blocks(str(file)))
    change = {name: delta(lora) for name, lora in read(whole.path).modules.items()}
    parts = [(first, second) if i == 2 else (first,) if i < 2 else (second,) for i in range(4)]  # the third has no role
    for name, some in zip((f"transformer.{name}" for name in names), parts, strict=True):
        torch.testing.assert_close(change[name], sum(delta(one[name]) for one in some), rtol=1e-6, atol=1e-6)
    with pytest.raises(UsageError, match="selects no layer"):
        merge_files(sources, tmp_path / "no.safetensors", "blocks", blocks=open_blocks("b-lora"))
    with pytest.raises(UsageError, match="concat has no setting 'blocks'"):
        merge_files(sources, tmp_path / "no.safetensors", "concat", blocks=open_blocks("splitflux"))


def test_roles_in_drawing_are_those_given_then_those_of_the_base(v_model: Base, v_base: Path, tmp_path: Path) -> None:
    usual = {role: BLOCKS["sdxl"][role] for role in ROLES}
    named = replace(v_model, name="icons")
    assert roles_in_drawing(v_model) == usual and roles_in_drawing(named) == TABLES["icons"].blocks
    assert roles_in_drawing(named, str(written(tmp_path, FILE)))["style"] == ("unet.mid_block",)
    base = shutil.copytree(v_base, tmp_path / "b-lora")  # the name of a table, which was not measured on a base
    assert roles_in_drawing(replace(v_model, name=str(base))) == usual
    (base / "unbraid.toml").write_text("[blocks]\n" + FILE)
    assert roles_in_drawing(replace(v_model, name=str(base)))["style"] == ("unet.mid_block",)
    (base / "unbraid.toml").write_text("[blocks]\ncontent = ['up_blocks.9']\nstyle = ['mid_block']")
    with pytest.raises(UsageError, match=r"unbraid.toml: 'up_blocks.9' selects no layer"):
        roles_in_drawing(replace(v_model, name=str(base)))


def test_a_lora_leaves_out_the_layers_of_the_other_role() -> None:
    """Every group of the base, by role: both act where no role is known."""
    use, blocks = Use(Path("x.safetensors")), TABLES["icons"].blocks
    some = {f"unet.{name}.attn1.to_q": Lora(torch.ones(1, 2), torch.ones(2, 1), 1.0) for name in GROUPS}
    left = {
        role: {groups_of([name])[0] for name in some}
        - {groups_of([name])[0] for name in in_role(use, role, blocks).kept(some, use.file)}
        for role in ROLES
    }
    assert left == {"content": set(blocks["style"]), "style": set(blocks["content"])}
    assert use.kept(some, use.file) == some
    with pytest.raises(UsageError, match=r"^y.safetensors: has no layers besides up_blocks, .*all its layers"):
        Use(use.file, without=("up_blocks", "down_blocks", "mid_block")).kept(some, Path("y.safetensors"))


def test_roles_of_loras_in_drawing(v_model: Base, tmp_path: Path) -> None:
    """As `generate` takes them, on a base of SDXL's family."""
    uses, known = [Use(Path("a")), Use(Path("b"))], BLOCKS["sdxl"]
    assert in_roles(uses, [], v_model) == uses == in_roles(uses, ["all", "all"], v_model)
    assert [one.without for one in in_roles(uses, ["all", "style"], v_model)] == [(), known["content"]]
    file = written(tmp_path, 'content = ["mid_block"]\nstyle = ["up_blocks"]')
    assert [one.without for one in in_roles(uses, ["content", "style"], v_model, str(file))] == [
        ("up_blocks",),
        ("mid_block",),
    ]
    strange = copy.copy(v_model)
    object.__setattr__(strange, "family", replace(v_model.family, name="flux"))
    for base, roles, given, fault in (
        (v_model, ["style"], "", "--lora-role: 1 for 2 of --lora"),
        (v_model, ["style", "subject"], "", "no role 'subject'.*content, style, all"),
        (v_model, [], "icons", "--blocks: there is no role"),
        (v_model, ["content", "style"], "splitflux", "selects no layer"),
        (strange, ["content", "style"], "", "is not known.*probe-blocks"),
    ):
        with pytest.raises(UsageError, match=fault):
            in_roles(uses, roles, base, given)


@pytest.mark.parametrize(
    ("family", "base", "table"),
    [
        ("sdxl", "icons", TABLES["icons"].blocks),
        ("sdxl", "b-lora", USUAL["sdxl"]),
        ("sdxl", "", USUAL["sdxl"]),
        ("sd15", "", USUAL["sd15"]),
        ("flux", "", {}),
    ],
)
def test_merge_by_roles_knows_the_base_that_the_loras_were_made_for(
    tmp_path: Path, family: Any, base: str, table: Blocks
) -> None:
    groups = ["transformer_blocks.0"] if family == "flux" else GROUPS[: 7 if family == "sdxl" else None]
    part, leaf = ("transformer", "attn") if family == "flux" else ("unet", "transformer_blocks.0.attn1")
    names = [f"{part}.{group}.{leaf}.to_q" for group in groups]
    sources = []
    for label in ROLES:
        modules = {name: Lora(torch.ones(1, 8), torch.ones(8, 1), 1.0) for name in names}
        path = tmp_path / f"{label}.safetensors"
        write(path, modules, family=family, dialect="diffusers", metadata={"unbraid.base": base} if base else {})
        sources.append(Source(path))
    out = tmp_path / "out.safetensors"
    if not table:
        with pytest.raises(UsageError, match=r"not known.*probe-blocks"):
            merge_files(sources, out, "roles")
        return
    done = merge_files(sources, out, "roles")
    made, whole = read(out).modules, {}
    for name in names:
        roles = {"content": not selects(table["style"], name), "style": not selects(table["content"], name)}
        assert delta(made[name])[0, 0] == pytest.approx(sum(roles.values())), name
        whole[name] = roles
    assert done.matched == {role: tuple(name for name in names if whole[name][role]) for role in ROLES}
    recipe = json.loads(read(out).metadata["unbraid.recipe"])
    assert {role: tuple(some) for role, some in recipe["settings"]["blocks"].items()} == dict(table)


@pytest.mark.parametrize("base", ["", "icons"])
@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_a_lora_is_taken_apart_by_role(tmp_path: Path, dialect: Any, base: str) -> None:
    """Each file leaves out the layers of the other role; what stays is as it was; both hold what has no role, and the text encoder."""
    names = [f"unet.{group}.transformer_blocks.0.attn1.to_q" for group in GROUPS[:7]]
    names += ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    whole = {name: Lora(torch.randn(2, 8), torch.randn(8, 2), 4.0) for name in names}
    source, roles = tmp_path / "whole.safetensors", tmp_path / "roles.toml"
    known = {"unbraid.base": base} if base else {}
    write(source, whole, family="sdxl", dialect=dialect, metadata={"modelspec.title": "Fox", **known})
    before = read(source).modules
    roles.write_text(f'content = ["{GROUPS[0]}"]\nstyle = ["{GROUPS[1]}"]')
    usual = TABLES["icons"].blocks if base else USUAL["sdxl"]
    for given, blocks in (([], usual), (["--blocks", str(roles)], open_blocks(str(roles)))):
        for role, other in (ROLES, ROLES[::-1]):
            out = tmp_path / f"{role}.safetensors"
            done = CliRunner().invoke(app, ["edit", str(source), str(out), "--lora-role", role, *given])
            found, kept = read(out), [name for name in names if not selects(blocks[other], name)]
            assert not done.exit_code and f"left out: {len(names) - len(kept)} modules, " in done.output, done.output
            assert len(kept) < len(names) and sorted(found.modules) == sorted(kept) and names[-1] in kept
            assert all(torch.equal(delta(found.modules[name]), delta(before[name])) for name in kept)
            assert found.metadata["modelspec.title"] == "Fox"


def test_changes_of_norms_have_the_role_of_their_layer() -> None:
    (style, *_), (content, *_) = USUAL["sdxl"]["style"], USUAL["sdxl"]["content"]
    vectors = {f"unet.{group}.norm.diff": torch.ones(4) for group in (style, content, "mid_block")}
    modules = {f"unet.{style}.proj_in": Lora(torch.ones(1, 4), torch.ones(4, 1), 1.0)}
    whole = LoraFile(modules, {}, "sdxl", {}, vectors, {f"unet.{style}.proj_in": 0.1})
    found, left = of_role(whole, "content")
    assert found.vectors.keys() == {f"unet.{content}.norm.diff", "unet.mid_block.norm.diff"}
    assert (found.modules, found.errors) == ({}, {})
    assert left == (f"unet.{style}.proj_in", f"unet.{style}.norm")


def test_what_cannot_be_taken_apart_is_one_line(tmp_path: Path) -> None:
    def written(name: str, family: Any, *modules: str) -> Path:
        some = {module: Lora(torch.ones(1, 8), torch.ones(8, 1), 1.0) for module in modules}
        write(tmp_path / name, some, family=family, dialect="diffusers")
        return tmp_path / name

    (style, *_) = USUAL["sdxl"]["style"]
    unet = written("a.safetensors", "sdxl", f"unet.{style}.transformer_blocks.0.attn1.to_q")
    flux = written("b.safetensors", "flux", "transformer.transformer_blocks.0.attn.to_q")
    out = tmp_path / "out.safetensors"
    for file, role, roles, fault in (
        (unet, "subject", None, "there is no role 'subject'.*content, style"),
        (unet, "content", None, "all layers of the file serve style.*--lora-role style"),
        (unet, "style", None, "no layer of the file serves content.*up_blocks.0.attentions.0"),
        (unet, "", TABLES["icons"].blocks, "--blocks: it counts with --lora-role alone"),
        (flux, "style", None, "not known.*probe-blocks"),
        (flux, "style", TABLES["unziplora"].blocks, "no layer of the file serves content"),
    ):
        with pytest.raises(UsageError, match=fault):
            edit(file, out, role=role, roles=roles)
        assert not out.exists()


def test_generate_draws_by_role(v_base: Path, v_model: Base, tmp_path: Path) -> None:
    """From the command line and in Python: the picture is that of a file without those layers, and says so."""
    whole = modules(v_model, 0)
    left = {name: lora for name, lora in whole.items() if not selects(USUAL["sdxl"]["style"], name)}
    assert left.keys() < whole.keys()
    for name, some in (("whole", whole), ("left", left)):
        write(tmp_path / f"{name}.safetensors", some, family="sdxl")

    def drawn(name: str, *options: str) -> bytes:
        out = tmp_path / f"{name}{len(options)}.png"
        given = [
            "--prompt",
            "a cat",
            "--lora",
            str(tmp_path / f"{name}.safetensors"),
            "--steps",
            "2",
            "--out",
            str(out),
        ]
        result = CliRunner().invoke(app, ["generate", *given, "--base", str(v_base), *options])
        assert result.exit_code == 0, result.exception
        with Image.open(out) as image:
            record = json.loads(image.text["unbraid"])  # type: ignore[attr-defined]
            assert record["loras"][0].get("without") == (list(USUAL["sdxl"]["style"]) if options else None)
            return image.tobytes()

    by_role = drawn("whole", "--lora-role", "content")
    assert by_role == drawn("left") != drawn("whole")
    given: dict[str, Any] = {"base": str(v_base), "steps": 2, "lora_roles": "content"}
    assert unbraid.generate("a cat", tmp_path / "whole.safetensors", **given)[0].tobytes() == by_role
    wrong = ["generate", "--prompt", "a", "--lora", "x", "--lora-role", "both", "--out", "x.png", "--base", "none"]
    result = CliRunner().invoke(app, wrong)
    assert isinstance(result.exception, UsageError) and "no role 'both'" in str(result.exception)
