"""The tables and figures of the documentation, from the CSVs in docs/study."""

import io
from pathlib import Path

import matplotlib

from benchmarks import markdown
from benchmarks.study import figures, tables, two_views
from benchmarks.study.records import LATER, RESULTS, published

ROOT = Path(__file__).parents[2]
PAGES = ("docs/study.md", "benchmarks/results/study.md", "README.md")


def report(root: Path = ROOT) -> None:
    """Draw all figures, and rewrite the blocks of every page. An error leaves all files as they were."""
    contents: dict[Path, bytes] = {}
    drawn = figures.all_figures(published("runs"), published("curves"))
    with matplotlib.rc_context(figures.STYLE):
        drawn["two_views"] = two_views.figure(two_views.read())
    for name, figure in drawn.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})  # the same bytes from the same data
        contents[root / "docs" / "study" / f"{name}.png"] = picture.getvalue()
    found = blocks()
    for page in PAGES:
        contents[root / page] = with_blocks((root / page).read_text(encoding="utf-8"), found).encode()
    for path, content in contents.items():
        path.write_bytes(content)


def blocks() -> dict[str, str]:
    """Return the content of every block by its name."""
    first, second, replication = (published(name) for name in ("runs", "runs-0.2", "replication"))
    third = published(f"runs{LATER}") if (RESULTS / f"runs{LATER}.csv").exists() else second[:0]
    return tables.blocks(first, second, third, replication) | two_views.blocks(two_views.read())


def with_blocks(text: str, contents: dict[str, str]) -> str:
    """Return the text of a page, with the content of each block that it has a marker of."""
    for name, content in contents.items():
        if f": {name} -->" in text:
            text = markdown.replaced(text, name, content)
    return text
