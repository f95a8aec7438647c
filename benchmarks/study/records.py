"""The CSVs of the study: "runs" has one row per run, "curves" one row per epoch of each run.

Accuracies and shares are in [0, 1]. An empty cell means that it was not measured.
"""

import json
from pathlib import Path

import pandas as pd

from benchmarks.study.grid import METHODS

RESULTS = Path(__file__).parents[2] / "docs" / "study"
LATER = "-0.3"  # in the file names of the runs by the training loop of version 0.3
KEYS = {
    name: ["dataset", "arch", "method", "eps", "seed", *more] for name, more in (("runs", ()), ("curves", ["epoch"]))
}


def published(name: str) -> pd.DataFrame:
    """Return a committed CSV: "runs" and "curves" are by version 0.1.0, "runs-0.2" by 0.2, and so on."""
    return pd.read_csv(RESULTS / f"{name}.csv")


def finished(folder: Path) -> dict[str, pd.DataFrame]:
    """Return all records of a folder.

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
        epochs += [{**{name: run[name] for name in KEYS["runs"]}, **row} for row in record["epochs"]]
    return {"runs": pd.DataFrame(runs), "curves": pd.DataFrame(epochs)}


def write(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Write the tables that have rows as CSVs, sorted, floats with six digits."""
    for name, table in tables.items():
        if len(table):
            how = {"index": False, "float_format": "%.6g", "lineterminator": "\n"}
            table.sort_values(KEYS[name]).to_csv(folder / f"{name}.csv", **how)
