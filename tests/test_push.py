"""`push`: the folder, its model card, and its upload to a stand-in of the hub's HTTP interface."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, constants
from PIL import Image
from test_every_base import material
from test_run import called_in_process

import unbraid
from unbraid.files.lora_file import read
from unbraid.images.sheets import save_image
from unbraid.methods import METHODS
from unbraid.methods.entry import ROLES
from unbraid.runs import shortest
from unbraid.runs.api import finish
from unbraid.runs.break_make import join
from unbraid.runs.model_card import LICENCES, Said, model_card
from unbraid.runs.published import published
from unbraid.runs.recorded import picture_texts
from unbraid.sampling.render import Sampling, Use

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(scope="module")
def runs(v_base: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name → the run folder of each verb's default method, and of modules that were joined without training."""
    out = tmp_path_factory.mktemp("push")
    given, made = material(picture, out), dict[str, Path]()
    options: dict[str, Any] = {"base": str(v_base), "previews": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbraid.runs.pace.PREVIEW_STEPS", 1)
        patch.setattr("unbraid.runs.pace.SHEET_STEPS", 1)
        for method in ("unziplora", "pair", "dreambooth", "break"):
            for job in shortest.jobs(method, given, out, **options):
                made[f"break-{job.settings['kind']}" if method == "break" else METHODS[method].verb] = finish(job)
        loras = {role: made["split"] / f"{role}.safetensors" for role in ROLES}
        modules = {role: made[f"break-{role}"] / "module.safetensors" for role in ROLES}
        given = shortest.Material(given.before, given.after, given.partners, loras=loras, modules=modules)
        for method in ("ziplora", "make"):
            (job,) = shortest.jobs(method, given, out, **options)
            made[METHODS[method].verb] = finish(job)
        made["joined"] = join(modules["content"], modules["style"], out / "joined" / "merged.safetensors").parent
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has the older way for large files
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def refused(*words: object) -> str:
    """The one line with which `unbraid push` refuses."""
    code, _, errors = called_in_process(["push", *map(str, words)])
    assert code == 1 and errors.startswith("unbraid: ") and errors.count("\n") == 1, errors
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["split", "pair", "learn", "break-content", "zip", "make", "joined"])
def test_a_folder_of_every_verb(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(unbraid.push(runs[name], f"ada/{name}", dry_run=tmp_path / "folder"))
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert ModelCard(str(card)).data.to_dict() == data, "what the hub's own class reads and writes stays as it is"
    assert {"text-to-image", "unbraid"} < set(data["tags"]) and data["pipeline_tag"] == "text-to-image"
    assert ("lora" in data["tags"]) == ("template:sd-lora" in data["tags"]) == (name != "break-content")
    assert data["instance_prompt"] and "base_model" not in data and "license" not in data, "a base of this machine"
    assert "<Gallery />" in card.text and f"hf download ada/{name}" in card.text
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == sorted(path.name for path in runs[name].glob("*.safetensors")) and files
    for file in files:
        assert file in card.text and (folder / file).read_bytes() == (runs[name] / file).read_bytes()
    shown = [one["output"]["url"] for one in data.get("widget", [])]
    assert len(shown) == (0 if name == "joined" else 1) and all((folder / one).is_file() for one in shown)
    assert not {str(runs[name].parent), "/tmp"} & set(str(card).split()) and str(runs[name].parent) not in str(card)


@pytest.mark.slow
def test_the_upload_is_the_folder(runs: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    folder = Path(unbraid.push(runs["split"], "ada/octopus", dry_run=tmp_path / "folder"))
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not hub.files, "a dry run uploads nothing"
    for _ in range(2):  # the second time, the repository is there
        code, out, _ = called_in_process(["push", str(runs["split"]), "ada/octopus", "--private"])
        assert code == 0 and out.strip() == f"{hub.address}/ada/octopus"
        found = hub.files["ada/octopus"]
        assert {name: found[name] for name in expected} == expected and len(found) == len(expected)
    assert [one["visibility"] for one in hub.made] == ["private"] * 2


@pytest.mark.slow
def test_pictures_that_the_loras_drew_are_shown(runs: dict[str, Path], tmp_path: Path) -> None:
    run, more = tmp_path / "run", tmp_path / "more"
    shutil.copytree(runs["split"], run)
    image = Image.new("RGB", (8, 8))
    nasty = 'a "fox": in `line` art | # style\n--- é'
    for path, prompt, lora in (
        (run / "drawn" / "a.png", "a sks cat", "content.safetensors"),
        (more / "b.png", nasty, "style.safetensors"),
        (more / "c.png", "of another LoRA", "other.safetensors"),
    ):
        save_image(image, path, picture_texts("icons", prompt, 0, Sampling(), [Use(Path(lora))]))
    save_image(image, more / "d.png", {"unbraid": "[1]"})
    (more / "e.png").write_bytes(b"no picture")
    folder = Path(unbraid.push(run, "ada/x", dry_run=tmp_path / "folder", pictures=more))
    widget = ModelCard.load(folder / "README.md").data.to_dict()["widget"]
    assert [one["text"] for one in widget] == ["a sks cat", nasty]
    assert (folder / "image_1.png").read_bytes() == (more / "b.png").read_bytes()


@pytest.mark.slow
def test_base_and_licence(runs: dict[str, Path]) -> None:
    found = published(runs["split"])
    for base, given, expected in (
        ("icons", Said("a/b"), {"license": "apache-2.0"}),
        (SDXL, Said("a/b"), {"license": "openrail++", "base_model": SDXL}),
        (str(runs["split"]), Said("a/b", base_model=SDXL), {"license": "openrail++", "base_model": SDXL}),
        (SDXL, Said("a/b", license="mit"), {"license": "mit", "base_model": SDXL}),
        ("some/finetune", Said("a/b"), {"base_model": "some/finetune"}),
    ):
        run = type(found)(**{**vars(found), "base": base})
        data = model_card(run, given, {}).data.to_dict()
        assert {key: data[key] for key in ("license", "base_model") if key in data} == expected
    for base, licence in LICENCES.items():
        card = model_card(type(found)(**{**vars(found), "base": base}), Said("a/b"), {})
        data = card.data.to_dict()
        assert (data["license"] == "other") == (len(licence) == 3) == ("license_link" in data)
        assert ("from_pretrained" in card.text) == (base != "icons")


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_line(runs: dict[str, Path], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs["learn"]
    assert "may not write there" in refused(run, "others/octopus")
    assert "refuses the model card" in refused(run, "ada/octopus", "--license", "mine")
    assert not hub.made, "an invalid card makes no repository"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not know your token" in refused(run, "ada/octopus")
    monkeypatch.setattr("unbraid.runs.push.get_token", lambda: None)
    assert "no token" in refused(run, "ada/octopus")
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(run, "ada/octopus")


@pytest.mark.slow
def test_runs_that_are_none_or_unfinished(runs: dict[str, Path], tmp_path: Path) -> None:
    unfinished, unknown, damaged = (tmp_path / name for name in ("unfinished", "unknown", "damaged"))
    for copy in (unfinished, unknown, damaged):
        shutil.copytree(runs["learn"], copy)
    (unfinished / "lora.safetensors").rename(unfinished / "elsewhere")
    (unknown / "run.toml").write_text('method = "nothing"')
    (damaged / "lora.safetensors").write_bytes(b"no tensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for run, words in (
        (tmp_path / "none", "no such run"),
        (tmp_path / "full", "no run in this folder"),
        (runs["learn"] / "lora.safetensors", "not a run folder"),
        (unfinished, "not finished"),
        (unknown, "unknown method"),
        (damaged, "not a readable safetensors file"),
    ):
        assert words in refused(run, "ada/x", "--dry-run", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (unfinished / "elsewhere").rename(unfinished / "lora.safetensors")
    (unfinished / "state.safetensors").touch()
    assert "not finished" in refused(unfinished, "ada/x")
    assert "in use" in refused(runs["learn"], "ada/x", "--dry-run", tmp_path / "full")
    assert "no such folder" in refused(runs["learn"], "ada/x", "--pictures", tmp_path / "none")


def test_names_that_are_none(tmp_path: Path) -> None:
    for name in ("octopus", "a/b/c", "../x", "a/", "ada/x y", "a--b/x..y"):
        assert "not a name on the hub" in refused(tmp_path, name)
    assert "--base-model" in refused(tmp_path, "ada/x", "--base-model", "sdxl.safetensors")


@pytest.mark.slow
def test_published_loras_are_read_as_they_were(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(unbraid.push(runs["zip"], "ada/x", dry_run=tmp_path / "folder"))
    before, after = (read(place / "style.safetensors") for place in (runs["zip"], folder))
    assert before.metadata == after.metadata and json.loads(after.metadata["unbraid.settings"])
