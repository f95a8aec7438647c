"""The CSVs of the study: one row per run, and one row per epoch of each run.

Accuracies and shares are in [0, 1]. An empty cell means that it was not measured.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from benchmarks.study.grid import METHODS, Run

RESULTS = Path(__file__).parents[2] / "docs" / "study"
LATER = "-0.3"  # in the file names of the runs by the training loop of version 0.3
KEY = ["dataset", "arch", "method", "eps", "seed"]  # one run of a version
COLUMNS = {
    "runs": [
        "dataset", "arch", "method", "options", "eps", "seed", "split_seed", "epochs",
        # Validation images. "apgd" is APGD-CE, then APGD-T on the images that are left, "apgd_ce" is the first alone.
        "natural", "pgd20", "cw30", "apgd", "apgd_ce",
        # Signs of gradient masking. Runs from 0.3 on leave out "nonlinearity" and "confidence".
        "transfer", "zero_gradients", "nonlinearity", "confidence",
        "test_natural", "test_pgd20", "test_apgd", "test_autoattack", "test_autoattack_images",
        "train_seconds", "measure_seconds", "device", "python", "torch", "cktat_loss", "date",
    ],
    "curves": [
        *KEY, "epoch", "clean_accuracy", "pgd_accuracy", "guidance", "consistency",
        # Percentiles of softmax(S(x'))[y] over the validation images, which is adaptive beta_i / beta.
        *(f"label_probability_p{percent:02}" for percent in (5, 25, 50, 75, 95)),
    ],
}  # fmt: skip


def published(name: str) -> pd.DataFrame:
    """Return a committed CSV: "runs" and "curves" are by version 0.1.0, "runs-0.2" by 0.2, and so on."""
    return pd.read_csv(RESULTS / f"{name}.csv")


def finished(folder: Path) -> dict[str, pd.DataFrame]:
    """Return "runs" and "curves" of all records in a folder.

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
    rows = {"runs": runs, "curves": epochs}
    return {name: pd.DataFrame(rows[name], columns=columns).sort_values(KEY) for name, columns in COLUMNS.items()}


def write(tables: dict[str, pd.DataFrame], folder: Path, suffix: str = "") -> None:
    """Write "runs" and "curves" as CSVs, floats with six digits."""
    for name, table in tables.items():
        table.to_csv(folder / f"{name}{suffix}.csv", index=False, float_format="%.6g", lineterminator="\n")


def take_in(folder: Path, into: Path = RESULTS) -> None:
    """Add the records of a folder to the committed CSVs of this version. No run that they have is lost."""
    tables = finished(folder)
    for name, key in {"runs": KEY, "curves": [*KEY, "epoch"]}.items():
        if (path := into / f"{name}{LATER}.csv").exists():
            both = pd.concat([pd.read_csv(path), tables[name]] if len(tables[name]) else [pd.read_csv(path)])
            tables[name] = both.drop_duplicates(key, keep="last").sort_values(key)
    write(tables, into, LATER)


def unread(claimed: Iterable[Run], folder: Path, autoattack_images: int) -> list[Run]:
    """Return the runs whose test images nobody has read: test images are read once per run.

    Raises:
        ValueError: some were read with another number of images for AutoAttack, and would not be pairs of the rest.
    """
    runs = finished(folder)["runs"].dropna(subset=["test_natural"])
    read = {Run(*row) for row in runs[KEY].itertuples(index=False)}
    left = [run for run in claimed if run not in read]
    others = {*runs.loc[runs["dataset"].isin({run.dataset for run in left}), "test_autoattack_images"]}
    if others - {autoattack_images}:
        raise ValueError(
            f"--autoattack-images must be {others.pop():g}, as for the runs that were read already; "
            f"got {autoattack_images}"
        )
    return left
