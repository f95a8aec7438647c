"""The log of a run: a CSV with a line an epoch, the same for TensorBoard, and a line to read."""

import csv
import io
from pathlib import Path

from checkpoint import replacing

# Percentiles, over the validation images, of the label's probability under attack: adaptive_beta's weights over beta.
LABEL_PROBABILITY = tuple(f"label_probability_p{percent:02d}" for percent in (5, 25, 50, 75, 95))

# One line an epoch. lr, eps and beta are those of its last step; the terms are means over its steps, before beta;
# accuracies and shares are of the validation images, in [0, 1]. Empty: does not apply.
COLUMNS = (
    "epoch",
    "lr",
    "eps",
    "beta",
    "loss",
    "guidance",
    "consistency",
    "clean_accuracy",
    "pgd_accuracy",
    "most_predicted_share",
    *LABEL_PROBABILITY,
    "train_seconds",  # all of the epoch's training, waiting for images too; of which:
    "attack_seconds",
    "teacher_seconds",
    "student_seconds",  # forward, loss, backward and optimizer step
    "validation_seconds",
)

PHASES = ("attack", "teacher", "student")

Row = dict[str, float | None]


class Logbook:
    """Writes the rows of a run into its folder; process 0 has one.

    Args:
        folder: of the run.
        tensorboard: write events too.
        epoch: the first that will be written; what an earlier process wrote of it for TensorBoard is dropped.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, epoch: int) -> None:
        self._path = folder / "log.csv"
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional

            self._events = SummaryWriter(folder, purge_step=epoch)

    def write(self, rows: list[Row]) -> None:
        """The whole CSV: a process that is killed and resumed leaves no line twice and none out."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: "" if value is None else f"{value:.6g}" for name, value in row.items()})
        with replacing(self._path) as file:
            file.write(text.getvalue().encode())
        if self._events is not None:
            last = rows[-1]
            for name, value in last.items():
                if value is not None:
                    self._events.add_scalar(name, value, last["epoch"])
            self._events.flush()


def read(path: Path) -> list[Row]:
    """The rows of a log.csv."""
    with open(path, newline="") as file:
        return [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]


def line(row: Row, epochs: int) -> str:
    """One epoch for the eye."""
    terms = (f"{name} {row[name]:.3f}" for name in ("loss", "guidance", "consistency") if row[name] is not None)
    scores = (
        f"{name} {row[column]:.1%}"
        for name, column in (("clean", "clean_accuracy"), ("PGD", "pgd_accuracy"))
        if row[column] is not None
    )
    phases = (f"{name} {row[f'{name}_seconds']:.1f}" for name in PHASES if row[f"{name}_seconds"] is not None)
    return (
        f"epoch {row['epoch']}/{epochs}: {', '.join(terms)}; validation: {', '.join(scores)}; "
        f"{row['train_seconds']:.1f} s ({', '.join(phases)}) + {row['validation_seconds']:.1f} s"
    )
