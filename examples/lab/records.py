"""The study's records: a line a run in runs.csv, a line an epoch of each in curves.csv.

Accuracies and shares are in [0, 1]; an empty cell means that it was not measured.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from checkpoint import replacing


@dataclass(frozen=True)
class Record:
    """A finished run. Measures are of the validation images, unless they begin with test_."""

    dataset: str
    arch: str
    method: str
    options: str  # of train_cktat.py, and after a bar what the study changed of the method
    eps: float
    seed: int
    split_seed: int
    epochs: int
    natural: float  # accuracy on clean images
    pgd20: float  # under PGD on the cross-entropy, 20 steps of eps/4
    cw30: float  # under PGD on the margin, 30 steps
    apgd: float  # under APGD-CE with 50 steps, then APGD-T with 3 targets x 50 steps on those still right
    # Signs of gradient masking.
    apgd_ce: float  # after the first of the two
    transfer: float | None  # on the adversarial images of the PGD-AT run with the same seed
    zero_gradients: float  # share of images whose cross-entropy has no gradient in float32
    nonlinearity: float  # median over images of |loss(x + d) - loss(x) - d * gradient| / loss(x + d), d of the attack
    confidence: float  # mean of the largest probability on clean images
    test_natural: float | None
    test_pgd20: float | None
    test_apgd: float | None
    test_autoattack: float | None  # standard, on the first test_autoattack_images of the test images
    test_autoattack_images: int | None
    train_seconds: float
    measure_seconds: float
    device: str
    python: str
    torch: str
    cktat_loss: str
    date: str


@dataclass(frozen=True)
class Epoch:
    """An epoch of a run, on the validation images, against PGD with 10 steps; losses on the training images."""

    dataset: str
    arch: str
    method: str
    eps: float
    seed: int
    epoch: int
    clean_accuracy: float
    pgd_accuracy: float
    guidance: float | None
    consistency: float | None
    # Percentiles over the images of softmax(S(x'))[y]: adaptive_beta's weight of each is beta times that.
    label_probability_p05: float
    label_probability_p25: float
    label_probability_p50: float
    label_probability_p75: float
    label_probability_p95: float


def write(path: Path, records: Sequence[Record | Epoch], kind: type) -> None:
    """All records of a kind, sorted, in one move."""
    text = io.StringIO()
    names = [field.name for field in fields(kind)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for record in sorted(records, key=_place):
        writer.writerow([_cell(getattr(record, name)) for name in names])
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def _place(record: Record | Epoch) -> tuple[str | float, ...]:
    epoch = (record.epoch,) if isinstance(record, Epoch) else ()
    return (record.dataset, record.arch, record.method, record.eps, record.seed, *epoch)


def read_runs(path: Path) -> list[Record]:
    """The runs of a runs.csv.

    Raises:
        ValueError: the file has other columns.
    """
    return _read(path, Record)


def read_curves(path: Path) -> list[Epoch]:
    """The epochs of a curves.csv."""
    return _read(path, Epoch)


def _read(path: Path, kind: type) -> list:
    wanted = {field.name: field.type for field in fields(kind)}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(wanted):
            raise ValueError(
                f"{path} must have the columns {', '.join(wanted)}; got {', '.join(reader.fieldnames or ())}"
            )
        return [kind(**{name: _value(text, wanted[name]) for name, text in row.items()}) for row in reader]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str, kind: object) -> object:
    if text == "" and kind is not str:
        return None
    return int(text) if kind in (int, int | None) else float(text) if kind in (float, float | None) else text
