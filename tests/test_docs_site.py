"""The docs build as a site, and a broken link stops the build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = ("mkdocs.yml", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "tools/docs_site.py")


def build(source: Path, out: Path) -> tuple[int, str]:
    """Returns exit status and messages."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    status, messages = build(ROOT, tmp_path / "site")
    assert status == 0, messages
    pair, api = ((tmp_path / "site" / name / "index.html").read_text("utf-8") for name in ("pair", "api"))
    assert '<a href="../comfyui/">ComfyUI</a>' in pair, "a path in the prose is a link"
    assert all(
        f'id="unbraid.{name}"' in api
        for name in ("runs.api.split_job", "runs.drawing.generate", "runs.options.UnziploraSettings.rank")
    )
    assert (tmp_path / "site" / "ARCHITECTURE" / "index.html").is_file()


@pytest.mark.slow
def test_broken_links_stop_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "docs", source / "docs")
    (source / "tools").mkdir()
    for name in ABOVE:
        shutil.copy(ROOT / name, source / name)
    (source / "docs" / "api.md").write_text("# Python\n")  # the slow page
    broken = (
        "See docs/nothing.md, [a page](nobody.md), [a part](bases.md#nowhere), and `docs/code.md`, which is code.\n"
    )
    with (source / "docs" / "glossary.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{broken}")
    (source / "docs" / "unlisted.md").write_text("# A page that the menu does not name\n")
    status, messages = build(source, tmp_path / "site")
    assert status != 0
    assert all(name in messages for name in ("nothing.md", "nobody.md", "#nowhere", "unlisted.md"))
    assert "code.md" not in messages
