"""The CSVs of the study, and the tables and figures that the documentation has of them.

"runs" has one row per run, "curves" one row per epoch of each run. Accuracies and shares are in [0, 1]. An empty cell
means that it was not measured.
"""

import json
from pathlib import Path

import matplotlib
import pandas as pd

from benchmarks import markdown
from benchmarks.study import figures, tables, two_views
from benchmarks.study.grid import METHODS, RESULTS

ROOT = Path(__file__).parents[2]
PAGES = ("docs/study.md", "benchmarks/results/study.md", "README.md")
KEY = ["dataset", "arch", "method", "eps", "seed"]  # of a run


def finished(folder: Path) -> dict[str, pd.DataFrame]:
    """Return all records of a folder, as "runs" and "curves".

    Raises:
        ValueError: a record was made with other settings than its method has now.
    """
    runs, epochs = [], []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        run = record["run"]
        if run["options"] != (wanted := METHODS[run["method"]].settings):
            raise ValueError(f"{path} was made with the settings {run['options']!r}, not {wanted!r}: use another --out")
        runs.append(run)
        epochs += [{**{name: run[name] for name in KEY}, **row} for row in record["epochs"]]
    return {"runs": pd.DataFrame(runs), "curves": pd.DataFrame(epochs)}


def write(folder: Path) -> None:
    """Write the CSVs of a folder's records, sorted, floats with six digits."""
    for name, table in finished(folder).items():
        if len(table):
            ordered = table.sort_values([*KEY, "epoch"] if name == "curves" else KEY)
            ordered.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")


def report() -> None:
    """Rewrite the blocks of every page, and draw all figures. A block that is wrong leaves all files as they were."""
    found, texts = blocks(), {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    texts = {page: with_blocks(text, found) for page, text in texts.items()}
    with matplotlib.rc_context(figures.STYLE):
        drawn = figures.all_figures(tables.published("runs"), tables.published("curves"))
        drawn["two_views"] = two_views.figure(two_views.read())
        for name, figure in drawn.items():  # the same bytes from the same data
            figure.savefig(RESULTS / f"{name}.png", dpi=120, metadata={"Software": None})
    for page, text in texts.items():
        (ROOT / page).write_text(text, encoding="utf-8")


def blocks() -> dict[str, str]:
    """Return the content of every block by its name."""
    return tables.blocks() | two_views.blocks(two_views.read())


def with_blocks(text: str, contents: dict[str, str]) -> str:
    """Return the text of a page, with the content of each block that it has a marker of."""
    for name, content in contents.items():
        if f": {name} -->" in text:
            text = markdown.replaced(text, name, content)
    return text
