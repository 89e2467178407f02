"""The studio in a real browser: Debian's chromium, driven by playwright."""

import io
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageStat

from tools.screenshots import browser_path, running
from unbraid.core.lora import Lora
from unbraid.files.formats.header import read_header
from unbraid.files.lora_file import read, write
from unbraid.runs import demo
from unbraid.studio import process, queue
from unbraid.studio.safety import Home, open_home

pytest.importorskip("gradio", reason="the studio needs gradio: pip install unbraid[studio]")
playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
BROWSER = browser_path()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no browser here: apt-get install chromium"),
]
WAIT = 240_000  # milliseconds: the machine may be busy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return open_home(tmp_path_factory.mktemp("browser") / "studio")


@pytest.fixture(scope="module")
def url(home: Home) -> Iterator[str]:
    with running(home.folder) as address:
        yield address
    for run in queue.runs(home):
        process.terminate(run.folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        found = tool.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """A page that fails the test if it reports an error, or asks another host for anything."""
    context = browser.new_context()
    found = opened(context, url)
    problems: list[str] = []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("request", lambda request: problems.append(request.url) if foreign(request.url, url) else None)
    yield found
    context.close()
    assert not problems


def foreign(asked: str, url: str) -> bool:
    return not asked.startswith((url, "data:", "blob:"))


def opened(context: Any, url: str) -> Any:
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(url)
    page.get_by_role("tab", name="Split").wait_for()
    return page


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def fill_split(page: Any, picture: Path, steps: int, method: str = "B-LoRA") -> None:
    """Fill the form of Split for a short training on the embedded base."""
    page.locator("#split-picture input[type=file]").set_input_files(picture)
    page.locator("#split-picture img").wait_for()
    page.get_by_label("Subject", exact=True).first.fill("cat")
    page.get_by_label("Style", exact=True).first.fill("ink")
    page.get_by_label(re.compile(method)).first.check()
    panel = page.get_by_role("tabpanel").filter(has=page.locator("#split-picture"))
    panel.get_by_text("Settings", exact=True).click()
    panel.get_by_label("steps").locator("visible=true").first.fill(str(steps))
    panel.get_by_label("rank").locator("visible=true").first.fill("2")


def started(page: Any, home: Home, verb: str = "split") -> str:
    """Press Start, and wait until the run is in the queue. Returns its name."""
    before = {run.name for run in queue.runs(home)}
    page.locator(f"#{verb}-start").click()
    page.locator(f"#{verb}-told", has_text="is in the queue").wait_for()
    (name,) = {run.name for run in queue.runs(home)} - before
    return name


def until(home: Home, name: str, *states: str) -> queue.Run:
    end = time.monotonic() + WAIT / 1000
    while (run := queue.look(home.run(name))).state not in states:
        assert time.monotonic() < end, (run, process.tail(run.folder))
        time.sleep(0.2)
    return run


def lora_file(tmp_path: Path, seed: int) -> Path:
    rng = torch.Generator().manual_seed(seed)
    modules = {
        f"unet.{name}.transformer_blocks.0.attn1.to_q": Lora(
            torch.randn(2, 128, generator=rng), torch.randn(128, 2, generator=rng), 2.0
        )
        for name in ("mid_block.attentions.0", "down_blocks.1.attentions.0", "up_blocks.1.attentions.0")
    }
    path = tmp_path / f"lora{seed}.safetensors"
    write(path, modules, family="sdxl", metadata={"modelspec.trigger_phrase": "a sks thing"})
    return path


def test_split_from_upload_to_download(page: Any, home: Home, picture: Path) -> None:
    fill_split(page, picture, 2)
    name = started(page, home)
    page.reload()  # in the middle: the page finds the training again
    tab(page, "Queue")
    page.get_by_label(re.compile(f"{name} · ")).check()
    page.locator("#about h3", has_text=name).wait_for()
    page.locator("#about", has_text="done: step 2 of 2").wait_for()
    page.locator("#sheet img").wait_for()
    with page.expect_download() as download:
        page.locator("#loras a", has_text=re.compile("safetensors|KB|MB")).first.click()
    assert read_header(Path(shutil.copy(download.value.path(), home.folder / "down.safetensors"))).shapes


def test_stop_and_go_on_in_two_tabs(page: Any, browser: Any, url: str, home: Home, picture: Path) -> None:
    fill_split(page, picture, 100_000)
    name = started(page, home)
    until(home, name, "running")
    tab(page, "Queue")
    page.get_by_label(re.compile(f"{name} · ")).check()
    context = browser.new_context()
    other = opened(context, url)
    other.locator("#strip", has_text=f"{name} · running").wait_for()
    tab(other, "Queue")
    other.get_by_label(re.compile(f"{name} · ")).check()
    other.locator("#about h3", has_text=name).wait_for()
    other.locator("#stop").click()
    page.locator("#about", has_text="stopped").wait_for()
    assert until(home, name, "stopped").state == "stopped"
    page.locator("#go-on").click()
    other.locator("#about", has_text=re.compile("running|starting|waiting")).wait_for()
    until(home, name, "running")
    page.locator("#stop").click()
    until(home, name, "stopped")
    page.locator("#remove").click()
    page.get_by_label(re.compile(f"{name} · ")).wait_for(state="detached")
    context.close()


def test_a_bad_file_is_told_in_a_sentence(page: Any, tmp_path: Path) -> None:
    bad = tmp_path / "cat.png"
    bad.write_bytes(b"this is no picture")
    page.locator("#split-picture input[type=file]").set_input_files(bad)
    page.get_by_label("Subject", exact=True).first.fill("cat")
    page.get_by_label("Style", exact=True).first.fill("ink")
    page.locator("#split-start").click()
    page.get_by_text("cat.png: this is not an image that can be read").wait_for()


def test_combine_two_files(page: Any, home: Home, tmp_path: Path) -> None:
    tab(page, "Combine")
    files = [lora_file(tmp_path, seed) for seed in (1, 2)]
    page.locator("#combine-upload").locator("xpath=..").locator("input[type=file]").first.set_input_files(files)
    page.get_by_text("Uploaded: ").wait_for()
    names = [name for name in home.lora_files() if "lora" in Path(name).stem]
    for field, name in (("#combine-content", names[0]), ("#combine-style", names[1])):
        page.locator(f"{field} input").fill(name)
        page.locator(f"{field} input").press("Enter")
    page.locator("#compare").click()
    page.get_by_text("on average").wait_for()
    page.locator("#interference img").wait_for()
    page.locator("#merge").click()
    page.get_by_text("Merged into").wait_for()
    merged = [path for name, path in home.lora_files().items() if "concat" in name]
    assert len(merged) == 1 and read(merged[0]).modules.keys() == read(files[0]).modules.keys()


def drawing(page: Any, prompt: str) -> Any:
    """Open Generate, for one picture in two steps. Returns the panel."""
    tab(page, "Generate")
    panel = page.get_by_role("tabpanel").filter(has=page.locator("#draw"))
    panel.get_by_label("Prompt", exact=True).fill(prompt)
    panel.get_by_text("More", exact=True).click()
    panel.get_by_label(re.compile("number input for How many pictures")).fill("1")
    panel.get_by_label(re.compile("number input for Steps")).fill("2")
    return panel


def test_draw(page: Any) -> None:
    drawing(page, "a teapot in flat style")
    page.locator("#draw").click()
    page.locator("#drawn img").first.wait_for()


def begin_with(page: Any, panel: Any, picture: Path) -> None:
    """Upload the picture to begin with."""
    panel.get_by_text("Begin with a picture", exact=True).click()
    editor = page.locator("#painted")
    with page.expect_file_chooser() as chooser:
        editor.locator("button[aria-label='Upload']").click()
    chooser.value.set_files(picture)
    editor.get_by_text("Upload an image").wait_for(state="hidden")


def test_a_painted_mask_is_what_is_drawn_anew(page: Any, home: Home) -> None:
    begin_with(page, drawing(page, "a panda in flat style"), demo.image())
    editor = page.locator("#painted")
    editor.locator("button[aria-label='Brush']").click()
    editor.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)  # until the canvas stands still
    box = editor.locator("canvas").last.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    page.mouse.move(x + 20, y, steps=5)
    page.mouse.up()
    page.wait_for_timeout(1000)
    page.locator("#draw").click()
    page.locator("#drawn img").first.wait_for()
    (mask,) = (home.folder / "inputs").glob("*-mask.png")
    with Image.open(mask) as image, Image.open(demo.image()) as picture:
        left, top, right, bottom = image.getbbox() or (0, 0, 0, 0)
        width, height = image.size
        assert image.size == picture.size
    assert left < width / 2 < right and top < height / 2 < bottom, "in the middle, where it was painted"
    assert (right - left) * (bottom - top) < width * height / 2, "and not everywhere"


def test_edit_a_picture(page: Any, home: Home) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    write(home.loras / "inked.safetensors", {layer: Lora(torch.randn(2, 256), torch.randn(256, 2), 2.0)}, family="sdxl")
    panel = drawing(page, "a fox in line art style")
    begin_with(page, panel, demo.image())
    panel.get_by_label("edit it: apply the style alone").check()
    panel.get_by_text("Style guidance", exact=True).click()
    page.locator("#style-lora input").fill("loras/inked.safetensors")
    page.locator("#style-lora input").press("Enter")
    panel.get_by_label("What the style is called").fill("ink")
    page.locator("#draw").click()
    page.locator("#drawn img").first.wait_for()
    (sheet,) = (home.folder / "sheets").glob("a-fox-in-line-art-style*.png")
    with Image.open(sheet) as image:
        assert image.size == (128, 128)


def test_pair_until_it_is_stopped(page: Any, home: Home, picture: Path, tmp_path: Path) -> None:
    with Image.open(picture) as image:
        image.convert("L").convert("RGB").save(tmp_path / "after.png")
    tab(page, "Pair")
    panel = page.get_by_role("tabpanel").filter(has=page.locator("#pair-before"))
    for side, file in (("before", picture), ("after", tmp_path / "after.png")):
        page.locator(f"#pair-{side} input[type=file]").set_input_files(file)
        page.locator(f"#pair-{side} img").wait_for()
    panel.get_by_label("Subject", exact=True).fill("cat")
    panel.get_by_label("Style", exact=True).fill("grey")
    panel.get_by_text("Settings", exact=True).click()
    panel.get_by_label("steps").locator("visible=true").first.fill("100000")
    panel.get_by_label("rank").locator("visible=true").first.fill("2")
    name = started(page, home, "pair")
    until(home, name, "running")
    tab(page, "Queue")
    page.get_by_label(re.compile(f"{name} · ")).check()
    page.locator("#about h3", has_text=name).wait_for()
    page.locator("#stop").click()
    assert until(home, name, "stopped").done > 0
    page.locator("#loras", has_text="style").wait_for()  # what it has learnt so far
    assert read(home.run(name) / "style.safetensors").modules


def test_look_after_the_library(page: Any, home: Home, tmp_path: Path) -> None:
    tab(page, "Library")
    files = [lora_file(tmp_path, seed) for seed in (3, 4)]
    field = page.locator("#library-upload").locator("xpath=..").locator("input[type=file]").first
    field.set_input_files(files)
    page.locator("#library-upload-told", has_text="Uploaded: ").wait_for()
    names = sorted(name for name in home.lora_files() if re.match(r"loras/lora[34]-", name))
    page.locator("#cards", has_text="“a sks thing”").wait_for()
    for name in names:
        page.get_by_label(name).check()
    page.locator("#merge-ticked").click()
    page.locator("#library-told", has_text="3 modules, rank 4").wait_for()
    page.get_by_label(names[1]).uncheck()
    page.locator("#doctor").click()
    page.locator("#library-told", has_text="loads 3 of 3 modules").wait_for()
    page.get_by_label("Rank", exact=True).fill("1")
    page.locator("#resize").click()
    page.locator("#library-told", has_text="rank 1").wait_for()
    with page.expect_download() as download:
        page.locator("#library-file a").first.click()
    smaller = read(Path(shutil.copy(download.value.path(), tmp_path / "down.safetensors")))
    assert all(len(lora.down) == 1 for lora in smaller.modules.values())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_one_column_on_a_phone(browser: Any, url: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = opened(context, url)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("Split", "Pair", "Combine", "Generate", "Library", "Queue"):
        page.get_by_role("tab", name=name, exact=True).wait_for()
    box, words = page.locator("#split-picture").bounding_box(), page.get_by_label("Subject").first.bounding_box()
    assert words["y"] > box["y"] + box["height"] and box["width"] > 300
    shot = Image.open(io.BytesIO(page.screenshot())).convert("L")
    assert (ImageStat.Stat(shot).mean[0] > 128) == (scheme == "light")
    context.close()
