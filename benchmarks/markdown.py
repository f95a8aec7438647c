"""Tables in Markdown, and pages in which a part between two markers is generated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[object], lines: Iterable[Sequence[object]]) -> str:
    rows = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, *lines)]
    rows.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def replaced(text: str, name: str, content: str) -> str:
    """The text with new content between ``<!-- begin: name -->`` and ``<!-- end: name -->``."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the text has no markers {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{content}\n{end}", text)
