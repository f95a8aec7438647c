"""The site is built without a warning, and shows every list with its items, nested as in the source."""

from __future__ import annotations

import json
import os
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS_PYTHON = ROOT / ".venv-docs" / "bin" / "python"
VOID = {"br", "hr", "img", "input", "link", "meta", "source", "wbr"}
# Read by another reader of Markdown than the site's: by CommonMark's rules, as GitHub does.
READ = """
import json, sys
from pathlib import Path
sys.path.insert(0, "docs")
from markdown_it import MarkdownIt
from site_hooks import PAGES
from_elsewhere = {built: Path(source) for source, built in PAGES.items()}
pages = from_elsewhere | {path.relative_to("docs").as_posix(): path for path in Path("docs").rglob("*.md")}
pages |= {path.as_posix(): path for path in Path("benchmarks/results").glob("*.md")}
reader = MarkdownIt("commonmark").enable("table")
print(json.dumps({built: reader.render(path.read_text()) for built, path in pages.items()}))
"""


class Outline(HTMLParser):
    """The lists of a page, for example ``ul(li,li(ol(li)))``. Lists in the API's docstrings are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            return
        skipped = bool(self.open and self.open[-1][1]) or "doc-object" in (dict(attrs).get("class") or "").split()
        self.open.append((tag, skipped))
        if tag in ("ul", "ol", "li") and not skipped:
            self.parts.append(f"{tag}(")

    def handle_endtag(self, tag: str) -> None:
        while self.open:
            name, skipped = self.open.pop()
            if name in ("ul", "ol", "li") and not skipped:
                self.parts.append(")")
            if name == tag:
                return


def outline(html: str) -> str:
    parser = Outline()
    parser.feed(html)
    parser.close()
    return "".join(parser.parts)


def article(page: str) -> str:
    """Return the page without navigation and footer."""
    return page[page.index("<article") : page.index("</article>")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Each page's name, its source's lists and the built page's."""
    if not DOCS_PYTHON.exists():
        pytest.skip("make docs first")
    site = tmp_path_factory.mktemp("site")
    build = [DOCS_PYTHON, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sources = json.loads(subprocess.run([DOCS_PYTHON, "-c", READ], cwd=ROOT, capture_output=True, check=True).stdout)
    built = {path.relative_to(site).with_suffix(".md").as_posix(): path for path in site.rglob("*.html")}
    assert {*built} - {"404.md"} == {*sources}
    return {name: (outline(text), outline(article(built[name].read_text()))) for name, text in sources.items()}


def test_every_list_has_its_items(pages: dict[str, tuple[str, str]]) -> None:
    assert sum(source.count("li(") for source, _ in pages.values()) > 100
    assert {name: source for name, (source, _) in pages.items()} == {name: built for name, (_, built) in pages.items()}
