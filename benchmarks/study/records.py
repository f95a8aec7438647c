"""The study's records as pandas tables: a row a run in runs.csv, a row an epoch of each run in curves.csv.

Accuracies and shares are in [0, 1]; an empty cell means that it was not measured.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from benchmarks.study.grid import SETTINGS

WHICH = {"dataset": "str", "arch": "str", "method": "str", "eps": "float", "seed": "int"}

# Measures are of the validation images, unless their name begins with test_.
RUN = {
    "dataset": "str",
    "arch": "str",
    "method": "str",
    "options": "str",  # of the training command, and after a bar what the study changed of the method
    "eps": "float",
    "seed": "int",
    "split_seed": "int",
    "epochs": "int",
    "natural": "float",  # accuracy on clean images
    "pgd20": "float",  # under PGD on the cross-entropy, 20 steps of eps/4
    "cw30": "float",  # under PGD on the margin, 30 steps
    "apgd": "float",  # under APGD-CE with 50 steps, then APGD-T with 3 targets x 50 steps on those still right
    # Signs of gradient masking.
    "apgd_ce": "float",  # after the first of the two
    "transfer": "float",  # on the adversarial images of the PGD-AT run with the same seed
    "zero_gradients": "float",  # share of images whose cross-entropy has no gradient in float32
    "nonlinearity": "float",  # median of |loss(x + d) - loss(x) - d * gradient| / loss(x + d), d of the attack
    "confidence": "float",  # mean of the largest probability on clean images
    "test_natural": "float",
    "test_pgd20": "float",
    "test_apgd": "float",
    "test_autoattack": "float",  # standard, on the first test_autoattack_images of the test images
    "test_autoattack_images": "Int64",
    "train_seconds": "float",
    "measure_seconds": "float",
    "device": "str",
    "python": "str",
    "torch": "str",
    "cktat_loss": "str",
    "date": "str",
}
# Of the validation images, against PGD with 10 steps; the two losses are of the training images.
EPOCH = WHICH | {
    "epoch": "int",
    "clean_accuracy": "float",
    "pgd_accuracy": "float",
    "guidance": "float",
    "consistency": "float",
    # Percentiles over the images of softmax(S(x'))[y]: the adaptive weight of each is beta times that.
    "label_probability_p05": "float",
    "label_probability_p25": "float",
    "label_probability_p50": "float",
    "label_probability_p75": "float",
    "label_probability_p95": "float",
}
# Runs of 0.1.0 with another split and other seeds; the weights are of terms that were added to the method.
REPLICATION = WHICH | {
    "clean_guidance": "float",  # weight of KL(softmax(T(x)/tau) || softmax S(x))
    "clean_label": "float",  # weight of CE(S(x), y)
    "split_seed": "int",
    "epochs": "int",
    "natural": "float",
    "pgd20": "float",
    "apgd": "float",
    "apgd_ce": "float",
    "confidence": "float",
    "most_predicted": "float",  # share of images that got the most frequent prediction
}


def frame(rows: Iterable[Mapping[str, object]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Rows as a table with these columns, sorted by what the run is."""
    table = pd.DataFrame([*rows], columns=[*columns]).astype(dict(columns))
    table["eps"] = table["eps"].map("{:.6g}".format).astype(float)  # as it comes back from a CSV: 8/255 has no end
    return table.sort_values([name for name in (*WHICH, "epoch") if name in columns], ignore_index=True)


def read(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """A CSV that `write` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has other columns.
    """
    texts = pd.read_csv(path, dtype=str, keep_default_na=False)
    if [*texts.columns] != [*columns]:
        raise ValueError(f"{path} must have the columns {', '.join(columns)}; got {', '.join(texts.columns)}")
    numbers = [name for name, kind in columns.items() if kind != "str"]
    texts[numbers] = texts[numbers].apply(pd.to_numeric)
    return texts.astype(dict(columns))


def write(path: Path, table: pd.DataFrame) -> None:
    """The table as a CSV, floats with six digits, in one move."""
    replace(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Put the content in the file's place in one move: whatever happens, it is the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def select(records: pd.DataFrame, dataset: str, eps: float | None = None, arch: str | None = None) -> pd.DataFrame:
    """The rows of a data set, at its first radius unless another is named, with its own network unless another is."""
    setting = SETTINGS[dataset]
    radius = f"{setting.eps[0] if eps is None else eps:.6g}"
    same = records["eps"].map("{:.6g}".format) == radius
    return records[(records["dataset"] == dataset) & (records["arch"] == (arch or setting.arch)) & same]


def by_method(found: pd.DataFrame, methods: Iterable[str]) -> dict[str, pd.DataFrame]:
    """The rows of each method that has any, in the order of the methods."""
    groups = dict(iter(found.groupby("method", sort=False)))
    return {method: groups[method] for method in dict.fromkeys(methods) if method in groups}
