"""The study's records as pandas tables: a row a run in runs.csv, a row an epoch of each run in curves.csv.

Accuracies and shares are in [0, 1]; an empty cell means that it was not measured.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
from runtime import replacing

from benchmarks.study.grid import SETTINGS

Columns = Mapping[str, type]
# The first five tell two runs of a version apart.
WHICH = {"dataset": str, "arch": str, "method": str, "eps": float, "seed": int}
RUN = {
    "dataset": str, "arch": str, "method": str,
    "options": str,  # of the training command, and after a bar what the study changed of the method
    "eps": float, "seed": int, "split_seed": int, "epochs": int,
    # Of the validation images.
    "natural": float,  # accuracy on clean images
    "pgd20": float,  # under PGD on the cross-entropy, 20 steps of eps/4
    "cw30": float,  # under PGD on the margin, 30 steps
    "apgd": float,  # under APGD-CE with 50 steps, then APGD-T with 3 targets x 50 steps on those still right
    # Of them too, signs of gradient masking.
    "apgd_ce": float,  # after the first of the two
    "transfer": float,  # on the adversarial images of the PGD-AT run with the same seed
    "zero_gradients": float,  # share of images whose cross-entropy has no gradient in float32
    "nonlinearity": float,  # median of |loss(x + d) - loss(x) - d * gradient| / loss(x + d), d of the attack
    "confidence": float,  # mean of the largest probability on clean images
    # Of the test images.
    "test_natural": float, "test_pgd20": float, "test_apgd": float,
    "test_autoattack": float, "test_autoattack_images": float,  # standard AutoAttack, on the first so many
    # How it was made.
    "train_seconds": float, "measure_seconds": float,
    "device": str, "python": str, "torch": str, "cktat_loss": str, "date": str,
}  # fmt: skip
EPOCH = {
    **WHICH, "epoch": int,
    "clean_accuracy": float, "pgd_accuracy": float,  # of the validation images; PGD with 10 steps
    "guidance": float, "consistency": float,  # of the training images
    # Percentiles over the validation images of softmax(S(x'))[y]: the adaptive weight of each is beta times that.
    **{f"label_probability_p{percent:02}": float for percent in (5, 25, 50, 75, 95)},
}  # fmt: skip
REPLICATION = {
    **WHICH,
    "clean_guidance": float, "clean_label": float,  # weights of KL(softmax(T(x)/tau) || softmax S(x)), CE(S(x), y)
    "split_seed": int, "epochs": int,
    "natural": float, "pgd20": float, "apgd": float, "apgd_ce": float, "confidence": float,
    "most_predicted": float,  # share of images that got the most frequent prediction
}  # fmt: skip


def key(columns: Iterable[str]) -> list[str]:
    """The columns of a table by which its lines are told apart and sorted."""
    return [name for name in columns if name in (*WHICH, "epoch")]


def frame(rows: Iterable[Mapping[str, object]], columns: Columns) -> pd.DataFrame:
    """Rows as a table with these columns, sorted by what the run is."""
    table = pd.DataFrame([*rows], columns=[*columns]).astype(columns)
    table["eps"] = table["eps"].map("{:.6g}".format).astype(float)  # as it comes back from a CSV: 8/255 has no end
    return table.sort_values(key(columns), ignore_index=True)


def read(path: Path, columns: Columns) -> pd.DataFrame:
    """A CSV that `write` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has other columns.
    """
    table = pd.read_csv(path, dtype=columns)
    if [*table.columns] != [*columns]:
        raise ValueError(f"{path} must have the columns {', '.join(columns)}; got {', '.join(table.columns)}")
    return table


def write(path: Path, table: pd.DataFrame) -> None:
    """The table as a CSV, floats with six digits, in one move."""
    with replacing(path) as file:
        table.to_csv(file, index=False, float_format="%.6g", lineterminator="\n")


def select(records: pd.DataFrame, dataset: str, eps: float | None = None, arch: str | None = None) -> pd.DataFrame:
    """The rows of a data set, at its first radius unless another is named, with its own network unless another is."""
    setting = SETTINGS[dataset]
    radius = float(f"{setting.eps[0] if eps is None else eps:.6g}")
    own = (records["dataset"] == dataset) & (records["arch"] == (arch or setting.arch))
    return records[own & (records["eps"] == radius)]


def by_method(found: pd.DataFrame, methods: Iterable[str]) -> dict[str, pd.DataFrame]:
    """The rows of each method that has any, in the order of the methods."""
    groups = dict(iter(found.groupby("method", sort=False)))
    return {method: groups[method] for method in dict.fromkeys(methods) if method in groups}
