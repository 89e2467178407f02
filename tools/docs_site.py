"""What mkdocs.yml cannot say: pages in the root of the repository, and links from the paths that our prose names."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ABOVE = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
NAMED = re.compile(rf"(?<![\w/.(\[-])(?:docs/([\w-]+\.md)|({'|'.join(map(re.escape, ABOVE))}))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in ABOVE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """`docs/files.md` becomes a link to that page, under the page's title. A page that does not exist stops a strict build."""
    del page, config

    def link(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        target = files.get_file_from_path(name)
        return f"[{target.page.title if target and target.page else name}]({name})"

    parts = CODE.split(markdown)
    parts[::2] = [NAMED.sub(link, part) for part in parts[::2]]  # every second part is code
    return "".join(parts)
