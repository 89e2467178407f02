"""Pictures of the studio for the docs: `python -m tools.screenshots docs/studio`.

Starts a studio in a temporary folder, uses it as a person does (a training on the embedded base takes minutes), and takes
pictures of its pages. Needs gradio, playwright and a chromium."""

import argparse
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from unbraid.runs import demo
from unbraid.studio import queue
from unbraid.studio.safety import Home, open_home

START = 300  # seconds until a studio must answer
WAIT = 3_600_000  # milliseconds that one action may take: the machine may be busy
SHORT = """() => { // the temporary folder is shown as `studio`
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replace(/\\/\\S+\\/studio\\//g, "studio/");
}"""
WIDE, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


@contextmanager
def running(folder: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """Start `unbraid studio` in a folder; gives its address, and ends it."""
    command = [sys.executable, "-m", "unbraid", "studio", "--folder", str(folder), "--no-open", "--port", "0", *options]
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as out:
        studio = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        try:
            yield _address(studio, log)
        finally:
            studio.send_signal(signal.SIGINT)
            try:
                studio.wait(30)
            except subprocess.TimeoutExpired:
                studio.kill()
                studio.wait()


def _address(studio: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START
    while time.monotonic() < end and studio.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("unbraid studio: "):
                return line.removeprefix("unbraid studio: ")
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def browser_path() -> str | None:
    """The chromium of this machine, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Camera:
    """A page of the studio, and the folder for its pictures."""

    def __init__(self, browser: Any, url: str, out: Path, scheme: str = "light", size: Any = None) -> None:
        self.context = browser.new_context(viewport=size or WIDE, color_scheme=scheme)
        self.page, self.out = self.context.new_page(), out
        self.page.set_default_timeout(WAIT)
        self.page.goto(url)
        self.tab("Split")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.page.wait_for_timeout(1500)

    def take(self, name: str, field: str = "") -> None:
        """Take a picture of what the window shows, from the top of the page, or of one field alone."""
        self.page.evaluate("window.scrollTo(0, 0)")
        self.page.evaluate(SHORT)
        self.page.mouse.move(2, 2)
        self.page.wait_for_timeout(2500)
        shot = self.page.locator(field).screenshot() if field else self.page.screenshot()
        image = Image.open(io.BytesIO(shot)).convert("RGB")
        image.save(self.out / f"{name}.webp", quality=80, method=6)
        print(self.out / f"{name}.webp", flush=True)

    def choose(self, field: str, value: str) -> None:
        """Choose in a list that can be typed into."""
        box = self.page.locator(f"{field} input").first
        box.fill(value)
        box.press("Enter")


def split(camera: Camera, home: Home, steps: int) -> str:
    """Split the demo's picture. Returns the name of the run, which has begun; that of the last run, if there is one already."""
    page = camera.page
    page.locator("#split-picture input[type=file]").set_input_files(demo.image())
    page.locator("#split-picture img").wait_for()
    page.get_by_label("Subject", exact=True).first.fill(demo.SUBJECT)
    page.get_by_label("Style", exact=True).first.fill(demo.STYLE)
    page.locator("#split-look").click()
    page.get_by_text("memory, estimated").wait_for()
    camera.take("split")
    panel = page.get_by_role("tabpanel").filter(has=page.locator("#split-picture"))
    panel.get_by_text("Settings", exact=True).click()
    panel.get_by_label("steps").locator("visible=true").first.fill(str(steps))
    camera.take("settings")
    if found := queue.runs(home):
        return found[0].name
    page.locator("#split-start").click()
    page.get_by_text("is in the queue").wait_for()
    return queue.runs(home)[0].name


def watch(camera: Camera, home: Home, name: str) -> None:
    """Look at the queue while the run trains, and when it is done."""
    camera.tab("Queue")
    camera.page.get_by_label(re.compile(f"{name} · ")).check()
    camera.page.locator("#sheet img").wait_for()
    if queue.look(home.run(name)).alive:
        camera.take("queue-training")
    while queue.look(home.run(name)).alive:
        time.sleep(1)
    camera.page.locator("#loras").wait_for()
    camera.take("queue-done")


def use(camera: Camera, home: Home) -> None:
    """Combine, draw, and look at the library, with the LoRAs of the run."""
    content, style = (next(name for name in home.lora_files() if f"{part}." in name) for part in ("content", "style"))
    page = camera.page
    camera.tab("Combine")
    camera.choose("#combine-content", content)
    camera.choose("#combine-style", style)
    page.locator("#compare").click()
    page.locator("#interference img").wait_for()
    camera.take("combine-interference")
    page.get_by_role("tabpanel").filter(has=page.locator("#compare")).get_by_label("Prompt", exact=True).fill(
        f"a sks {demo.SUBJECT} in {demo.STYLE} style"
    )
    page.locator("#side-by-side").click()
    page.locator("#combine-sheet img").wait_for()
    camera.take("combine-side-by-side", "#combine-sheet")
    page.set_viewport_size({**WIDE, "height": 1180})  # what comes out is below the form
    camera.tab("Generate")
    panel = page.get_by_role("tabpanel").filter(has=page.locator("#draw"))
    panel.get_by_label("Prompt", exact=True).fill(f"a teapot in {demo.STYLE} style")
    camera.choose("#lora-0", style)
    page.locator("#draw").click()
    page.locator("#drawn img").first.wait_for()
    camera.take("generate")
    camera.tab("Library")
    panel = page.get_by_role("tabpanel").filter(has=page.locator("#cards"))
    panel.get_by_label(style).check()
    page.locator("#doctor").click()
    page.get_by_text("modules").last.wait_for()
    camera.take("library")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="of the training that is shown")
    parser.add_argument("--folder", type=Path, help="a studio's folder with a finished run: nothing is trained then")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as tool:
        home = open_home(given.folder or Path(temporary) / "studio")
        browser = tool.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        with running(home.folder) as url:
            camera = Camera(browser, url, given.out)
            watch(camera, home, split(camera, home, given.steps))
            use(camera, home)
            dark = Camera(browser, url, given.out, "dark")
            dark.tab("Queue")
            dark.take("queue-dark")
            dark.tab("Library")
            dark.take("library-dark")
            phone = Camera(browser, url, given.out, "light", PHONE)
            phone.take("split-phone")
            phone = Camera(browser, url, given.out, "dark", PHONE)
            phone.page.get_by_role("tab", name="Queue").click()
            phone.take("queue-phone-dark")
        browser.close()


if __name__ == "__main__":
    main()
