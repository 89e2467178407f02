"""Captions and folders are read or refused in one line, and unused files are reported."""

import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image, features
from test_run import cli_in_process

from unbraid.bases.base import Picture, RunData, load
from unbraid.common.errors import UsageError
from unbraid.images.captions import caption_of, captions_of
from unbraid.images.folders import look, matched
from unbraid.runs.api import learn_job, pair_job
from unbraid.runs.batch import recorded
from unbraid.runs.job import Job
from unbraid.runs.run import run

READ = {
    "plain": (".txt", b"a sks cat on a mat", ("a sks cat on a mat",)),
    "bom": (".txt", b"\xef\xbb\xbfa sks cat", ("a sks cat",)),
    "utf-16": (".txt", "a sks cat".encode("utf-16"), ("a sks cat",)),
    "utf-16-be": (".txt", b"\xfe\xff" + "ein Käse".encode("utf-16-be"), ("ein Käse",)),
    "utf-32": (".txt", "a sks cat".encode("utf-32"), ("a sks cat",)),
    "latin-1": (".txt", b"un chat r\xeaveur", ("un chat rêveur",)),
    "cp1252": (".txt", b"a \x93sks\x94 cat", ("a “sks” cat",)),
    "caption": (".caption", b"a sks cat", ("a sks cat",)),
    "lines": (".txt", b"a sks cat\r\n\r\n  on a   mat \r\n", ("a sks cat", "on a mat")),
    "emoji": (".txt", "{cat} <lora:y:1> \U0001f63a %s".encode(), ("{cat} <lora:y:1> \U0001f63a %s",)),
    "none": (".json", b"{}", ()),
}
REFUSED = {
    "empty": (b"", "the caption is empty"),
    "blank": (b" \n\t\n", "the caption is empty"),
    "bom alone": (b"\xef\xbb\xbf", "the caption is empty"),
    "nul": (b"a cat\0b", "control characters"),
    "escape": (b"\x1b[31mred", "control characters"),
    "half": (b"\xff\xfea", "cannot be read as text"),
    "large": (b"x" * (1 << 20) + b"y", "too large"),
}


def draw(path: Path, colour: str = "teal") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 48), colour).save(path)
    return path


@pytest.mark.parametrize("name", READ)
def test_captions_are_read(name: str, tmp_path: Path) -> None:
    suffix, data, wanted = READ[name]
    (tmp_path / f"p{suffix}").write_bytes(data)
    assert captions_of(tmp_path / "p.png") == wanted
    if len(wanted) < 2:
        assert caption_of(tmp_path / "p.png") == (wanted[0] if wanted else None)
        return
    with pytest.raises(UsageError, match="2 captions, one a line"):
        caption_of(tmp_path / "p.png")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_caption_is_one_line(name: str, tmp_path: Path) -> None:
    data, what = REFUSED[name]
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(UsageError, match=what) as raised:
        captions_of(tmp_path / "p.png")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300 + len(str(tmp_path))


def test_several_captions_are_drawn_in_turn(v_base: Path, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a sks cat\na cat on a mat\na dog\n")
    options = {"out": tmp_path / "r", "base": str(v_base), "rank": 2, "steps": 2, "previews": 1}
    job = learn_job(tmp_path / "a.png", prompt="a sks thing", **options)
    assert job.data.captions == {tmp_path / "a.png": "a sks cat\na cat on a mat\na dog"}
    files = [event.file.name for event in run(job, device="cpu") if event.file]
    assert "lora.safetensors" in files and "sheet.png" in files
    assert recorded(tmp_path / "r" / "run.toml") == job
    base = load(str(v_base), "cpu")
    picture = Picture(torch.zeros(4, 4, 4), torch.ones(4, 4, 4), torch.zeros(6), ("one", "two", "three"))
    run_data, rng = RunData(base, {"image": [picture]}, {}), torch.Generator().manual_seed(0)
    seen = [run_data.draw(["image"], frozenset(), rng)[0].prompt for _ in range(60)]
    assert {one: seen.count(one) > 9 for one in seen} == {"one": True, "two": True, "three": True}


def test_a_folder_says_what_of_it_is_not_used(v_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = ["a.png", "b.webp", "d.gif", "e.tga"] + (["c.avif"] if features.check("avif") else [])
    for name in names:
        draw(folder / name)
    Image.new("RGB", (48, 48)).save(folder / "f.jfif", "JPEG")
    Image.new("RGB", (48, 48)).save(folder / "G.JPG", "JPEG")
    for name in ("a.txt", "b.caption", "h.txt", "notes.md", "x.heic", ".DS_Store", "Thumbs.db"):
        (folder / name).write_text("a cat")
    (folder / "old").mkdir()
    found = look(folder)
    assert {one.name for one in found.files} == {*names, "f.jfif", "G.JPG"}
    (raised,) = found.unused
    assert all(name in raised for name in ("h.txt (no picture of that name)", "notes.md", "x.heic", "old/"))
    assert not any(name in raised for name in ("a.txt", "b.caption", "DS_Store", "Thumbs"))
    options = {"out": tmp_path / "r", "base": str(v_base), "rank": 2, "steps": 1, "previews": 0}
    job = learn_job(folder, prompt="a sks thing", **options)
    assert [event.warning for event in run(job, device="cpu") if event.warning] == [raised]


def test_an_animation_is_said(v_base: Path, tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), "red").save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (48, 48))]
    )
    options = {"out": tmp_path / "r", "base": str(v_base), "rank": 2, "steps": 1, "previews": 0}
    events = run(learn_job(tmp_path / "a.gif", prompt="a sks thing", **options), device="cpu")
    assert [event.warning.endswith("holds several pictures; the first one is used") for event in events if event.warning] == [True]  # fmt: skip


def test_a_folder_of_a_run_is_no_folder_of_pictures(v_base: Path, picture: Path, tmp_path: Path) -> None:
    """The README's commands in order: the pictures that one command drew are no training pictures for the next."""
    out = tmp_path / "octopus"
    options = {"out": out, "base": str(v_base), "rank": 2, "steps": 1, "previews": 1}
    list(run(learn_job(picture, prompt="a sks cat", **options), device="cpu"))
    assert (out / "sheet.png").exists()
    code, text = cli_in_process(
        ["learn", str(out), "--prompt", "a sks cat", "--out", str(tmp_path / "n"), "--base", str(v_base)]
    )
    assert code == 1 and "folder of a run" in text and len(text.splitlines()) == 1 and not (tmp_path / "n").exists()


def test_pairs_go_by_name(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for i, (one, other) in enumerate((("png", "webp"), ("webp", "png"), ("png", "png"))):
        draw(before / f"{i}.{one}")
        draw(after / f"{i}.{other}")
    assert [(a.stem, b.stem) for a, b in matched(before, after)] == [("0", "0"), ("1", "1"), ("2", "2")]
    for i in range(12):  # as text, 10 comes before 2
        draw(tmp_path / "photos" / f"cat-{i}.png")
        draw(tmp_path / "drawn" / f"cat-{i}-ink.png")
    couples = matched(tmp_path / "photos", tmp_path / "drawn")
    assert len(couples) == 12 and all(f"{a.stem}-ink" == b.stem for a, b in couples)


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (("1.png", "2.png"), ("1.png",), "no counterpart by its name"),
        (("a.png", "b.png"), ("c.png", "d.png"), "no counterpart by its name"),
        (("a.png", "a.jpg"), ("a.png", "b.png"), "two pictures of the name 'a'"),
        (("a.png",), (), "no images in this folder"),
    ],
)
def test_pairs_are_not_guessed(first: tuple[str, ...], second: tuple[str, ...], what: str, tmp_path: Path) -> None:
    for folder, names in (("b", first), ("a", second)):
        (tmp_path / folder).mkdir()
        for name in names:
            draw(tmp_path / folder / name)
    with pytest.raises(UsageError, match=what):
        pair_job(tmp_path / "b", tmp_path / "a", subject="cat", style="ink")


@pytest.mark.slow
def test_odd_names_of_pictures_do_no_harm(v_base: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("new\nline.png", "[bold]x.png", "\U0001f98a.png", "quote'\".png")):
        options = {"out": tmp_path / f"r{i}", "base": str(v_base), "rank": 2, "steps": 1, "previews": 1}
        job = learn_job(draw(tmp_path / name), prompt="a \U0001f98a cat", **options)
        assert any(event.file and event.file.name == "sheet.png" for event in run(job, device="cpu"))
        record = tomllib.loads((tmp_path / f"r{i}" / "run.toml").read_text())
        assert record["images"]["image"] == [str(tmp_path / name)]
        assert isinstance(recorded(tmp_path / f"r{i}" / "run.toml"), Job)
