"""Hooks for MkDocs that add pages from outside docs/, rewrite their links, and draw formulas without scripts.

The pages are written to be read in the repository. The README links to ``docs/study.md``, and a page of docs/ links to
``../kernels``. The hooks follow each link in the repository. A link to a page or file of the site becomes a link within
the site. A link to source code, which the site does not have, is replaced by its text. A link to nothing stays, so that
MkDocs reports it.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages outside docs/, and their names in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "measuring.md",
    "examples/README.md": "examples.md",
}
# Files outside docs/ that pages link to or show.
ASSETS = ("benchmarks/results/*.png", "benchmarks/results/*.md", "CITATION.cff")
SHIM = "https://unpkg.com/iframe-worker/shim"
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for path in (path for pattern in ASSETS for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Rewrite the links of a page, except in code blocks."""
    parts = FENCED.split(markdown)  # Even parts are text, odd parts are code.
    parts[::2] = (LINK.sub(lambda link: _in_site(link, page.file, files), text) for text in parts[::2])
    return "".join(parts)


def on_page_content(content: str, page: Page, config: Any, files: Files) -> str:
    """Replace the formulas of a page by MathML, which browsers draw without a script."""

    def mathml(formula: re.Match[str]) -> str:
        display = "inline" if formula[1] == "span" else "block"
        drawn = str(convert(html.unescape(formula[2]), display=display))
        return drawn if display == "inline" else f'<div class="formula">{drawn}</div>'

    return FORMULA.sub(mathml, content)


def on_post_page(output: str, page: Page, config: Any) -> str:
    """Load the script that the theme would fetch from another host from docs/."""
    return output.replace(SHIM, get_relative_url("iframe-worker.js", page.url))


def on_post_template(output: str, template_name: str, config: Any) -> str:
    return output.replace(SHIM, "/iframe-worker.js")  # An absolute path, because a server shows 404.html for any path.


def _in_site(link: re.Match[str], file: File, files: Files) -> str:
    mark, text, target, anchor = link[1], link[2], link[3], link[4] or ""
    if not target or ":" in target:
        return link[0]
    path = (Path(str(file.abs_src_path)).parent / target).resolve()
    if not path.is_relative_to(ROOT) or not path.exists():
        return link[0]
    source = path.relative_to(ROOT).as_posix()
    inside = PAGES.get(source) or (path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else source)
    if files.get_file_from_path(inside) is None:
        return text
    relative = os.path.relpath(inside, os.path.dirname(file.src_uri) or ".")
    return f"{mark}[{text}]({relative}{anchor})"
