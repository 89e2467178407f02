"""Forms, presets, library and comparisons of the studio, without a browser and without gradio."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from unbraid.cli.main import app as command_line
from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.files.formats.metadata import card as metadata
from unbraid.files.lora_file import read, write
from unbraid.files.merge_methods import METHODS as MERGES
from unbraid.images.opening import open_image
from unbraid.methods import ENTRIES
from unbraid.runs.api import split, split_job
from unbraid.runs.batch import recorded
from unbraid.runs.folder import JOB
from unbraid.runs.run import run
from unbraid.runs.settings import open_settings
from unbraid.sampling.render import Use
from unbraid.studio import combining, drawing, forms, library, presets, queue
from unbraid.studio.checkpoint import checkpoint
from unbraid.studio.safety import Home, open_home

LAYERS = ("mid_block.attentions.0", "down_blocks.1.attentions.0", "up_blocks.1.attentions.0")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "studio")


def save(home: Home, name: str, seed: int = 0, **about: Any) -> Path:
    rng = torch.Generator().manual_seed(seed)
    modules = {
        f"unet.{layer}.transformer_blocks.0.attn1.to_q": Lora(
            torch.randn(2, 64, generator=rng), torch.randn(64, 2, generator=rng), 2.0
        )
        for layer in LAYERS
    }
    path = home.loras / f"{name}.safetensors"
    write(path, modules, family="sdxl", metadata=metadata(**about))
    return path


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_forms_are_made_from_the_entries(entry: Any) -> None:
    shown = {one.name: one for one in forms.settings_of(entry)}
    assert shown.keys() == open_settings(entry).keys() == forms.usual(entry, "icons").keys()
    assert all(one.about for one in shown.values())
    typed = {
        name: one.choices[0] if one.choices else "0-0.7" if one.kind == "text" else 3 for name, one in shown.items()
    }
    for name, text in forms.changed(entry, typed).items():
        kind = type(open_settings(entry)[name].default)
        assert text == (repr(kind(3)) if typed[name] == 3 else typed[name])
    assert forms.changed(entry, dict.fromkeys(shown)) == {}


def request(picture: Path, base: Path, **settings: str) -> forms.Request:
    words = {"subject": "cat; --out=/etc", "style": "--style"}
    return forms.Request("split", (picture,), words, "blora", str(base), 3, {"rank": "2", "steps": "2", **settings})


def test_the_command_line_understands_what_a_form_makes(
    home: Home, picture: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = forms.enqueue(home, request(picture, v_base))
    assert queue.look(folder).state == "waiting" and folder.parent == home.runs
    todo = command_line(forms.command(request(picture, v_base), folder), standalone_mode=False)
    assert todo.job == recorded(folder / JOB)
    assert todo.job.out == folder and todo.job.data.words == {"subject": "cat; --out=/etc", "style": "--style"}


@pytest.mark.parametrize("settings", [{"rank": "0"}, {"steps": "-1"}, {"lr": "nan"}, {"nothing": "1"}, {"rank": "x"}])
def test_wrong_settings_are_refused_before_the_queue(
    home: Home, picture: Path, v_base: Path, settings: dict[str, str]
) -> None:
    with pytest.raises(UsageError):
        forms.enqueue(home, request(picture, v_base, **settings))
    assert queue.runs(home) == [] and not [*home.runs.iterdir()]


def test_settings_that_do_not_fit_each_other_are_refused(home: Home, picture: Path) -> None:
    short = forms.Request(
        "split", (picture,), {"subject": "a", "style": "b"}, "unziplora", "icons", 0, {"steps": "2", "window": "9"}
    )
    with pytest.raises(UsageError, match="does not fit a period"):
        forms.enqueue(home, short)


def test_presets_are_files_that_the_command_line_reads(home: Home, picture: Path, v_base: Path) -> None:
    assert presets.save(home, "Quick & dirty", "blora", {"rank": "2", "lr": "0.01"}) == "quick-dirty"
    assert presets.save(home, "quick-dirty", "unziplora", {"column_separation": "false"}) == "quick-dirty"
    assert presets.names(home) == ["quick-dirty"]
    assert presets.load(home, "quick-dirty", "blora") == {"rank": 2, "lr": 0.01}
    assert presets.load(home, "quick-dirty", "unziplora") == {"column_separation": "false"}
    config = home.folder / "presets" / "quick-dirty.toml"
    given = ["split", str(picture), "--subject=a", "--style=b", "--method=blora", f"--config={config}"]
    assert command_line(given, standalone_mode=False).job.settings["rank"] == 2
    (home.folder / "presets" / "away.toml").symlink_to(picture)
    for name in ("away", "../x", "", None, 7):
        with pytest.raises(UsageError):
            presets.load(home, name, "blora")
    with pytest.raises(UsageError, match="as usual"):
        presets.save(home, "empty", "blora", {})


def test_the_library_trusts_nothing_of_a_file(home: Home) -> None:
    save(home, "plain", title="Ink", trigger="in <script>alert(1)</script> style", thumbnail=Image.new("RGB", (9, 9)))
    bad = save(home, "bad")
    lora = read(bad)
    script = {"modelspec.thumbnail": "data:image/svg+xml;base64,' onerror='alert(1)", "unbraid.prompt": "<img src=x>"}
    write(bad, lora.modules, family="sdxl", metadata=script)
    (home.loras / "broken.safetensors").write_bytes(b"no")
    found = {one.name: one for one in library.cards(home)}
    assert found["loras/plain.safetensors"].thumbnail.startswith("data:image/jpeg")
    assert found["loras/bad.safetensors"].thumbnail == "" and found["loras/broken.safetensors"].problem
    text = library.html(list(found.values()))
    assert "<script" not in text and "<img src=x" not in text and "onerror" not in text
    examined = library.examined(home.lora("loras/plain.safetensors"), "")
    assert "**ComfyUI**" in examined and "of 3 modules" in examined


def test_two_loras_are_compared(home: Home) -> None:
    first, second = save(home, "a", 1), save(home, "b", 2)
    text, plot = combining.compared(home, combining.Two(Use(first), Use(second)))
    assert "on average" in text and open_image(plot).width > 500
    text, _ = combining.compared(home, combining.Two(Use(first), Use(first)))
    assert "**1.00**" in text and "**100 %**" in text


def test_every_way_to_combine_is_offered() -> None:
    zips = {entry.name for entry in ENTRIES if entry.verb == "zip"}
    assert combining.ways().keys() >= {*MERGES, *zips, "k-lora", "switch", "composite"}


def test_side_by_side(home: Home, v_base: Path) -> None:
    first, second = save(home, "a", 1), save(home, "b", 2)
    with drawing.using(str(v_base)) as base:
        layers = [name for name, _ in base.denoiser.named_modules() if name.endswith("attn1.to_q")]
        shapes = {name: base.denoiser.get_submodule(name).weight.shape for name in layers}
    for path in (first, second):  # of this base's size
        rng = torch.Generator().manual_seed(ord(path.stem))
        modules = {
            f"unet.{name}": Lora(torch.randn(2, k, generator=rng), torch.randn(d, 2, generator=rng), 2.0)
            for name, (d, k) in shapes.items()
        }
        write(path, modules, family="sdxl")
    two = combining.Two(Use(first), Use(second, 0.5))
    what = combining.default_drawing("a cat", str(v_base), 2)
    ways = ["concat", "np-lora", "k-lora", "ziplora"]
    sheet, left = combining.sheet(home, two, ways, drawing.Drawing(what.prompt, what.base, sampling=what.sampling))
    assert len(left) == 1 and "have not been zipped yet" in left[0]
    three, one = open_image(sheet).height, combining.sheet(home, two, ["concat"], what)[0]
    assert three > 2.5 * open_image(one).height
    assert not [*(home.folder / "cache").iterdir()]
    with pytest.raises(UsageError):
        combining.sheet(home, two, ["../x"], what)


def test_a_painted_mask(home: Home, picture: Path) -> None:
    size = open_image(picture).size
    layer = Image.new("RGBA", size)
    empty = home.folder / "cache" / "empty.png"
    layer.save(empty)
    assert drawing.mask_of(home, picture, [empty]) is None
    layer.paste((255, 255, 255, 255), (0, 0, 10, 10))
    layer.save(home.folder / "cache" / "painted.png")
    mask = drawing.mask_of(home, picture, [home.folder / "cache" / "painted.png"])
    assert mask and (found := open_image(mask)).size == size
    assert found.getpixel((5, 5)) == (255,) * 3 and found.getpixel((30, 30)) == (0,) * 3


def test_duration() -> None:
    assert [forms.duration(one) for one in (5.0, 300.0, 9000.0)] == ["5 seconds", "5 minutes", "2.5 hours"]


def test_a_checkpoint_is_what_a_shorter_training_gives(
    home: Home, picture: Path, v_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unbraid.runs.pace.SAVE_EVERY", -1.0)
    given: dict[str, Any] = {"subject": "cat", "style": "ink", "method": "blora", "base": str(v_base), "previews": 0}
    folder = home.new_run("cat")
    with pytest.raises(UsageError, match="no saved state"):
        checkpoint(home, folder)
    training = run(split_job(picture, **given, out=folder, steps=4, rank=2))
    while next(training).done < 3:  # a step is saved when the next one begins
        pass
    made = {path.stem.rpartition("-")[2]: read(path) for path in checkpoint(home, folder)}
    shorter = split(picture, **given, out=home.new_run("short"), steps=2, rank=2)
    assert {name.partition("/")[2] for name in home.lora_files() if name.startswith("loras/")} == {
        f"cat-step-2-{role}.safetensors" for role in made
    }
    for role, lora in made.items():
        wanted = read(shorter / f"{role}.safetensors").modules
        assert lora.modules.keys() == wanted.keys()
        assert all(torch.equal(one.up, wanted[name].up) for name, one in lora.modules.items())
    assert [event.file.name for event in training if event.file][:2] == ["content.safetensors", "style.safetensors"]
