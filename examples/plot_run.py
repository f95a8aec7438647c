"""Draw the accuracies and loss terms of one or more runs from their log.csv, to compare them.

    python examples/plot_run.py out/student --out curves.png
    python examples/plot_run.py out/student out/literal out/trades --out curves.png

RUN is what train.py was given as --out.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from runtime import Row, UserError, read_log, replacing
from tyro.conf import Positional, arg

COLORS = ("#2463a8", "#d9730d", "#1a7f4b", "#8e44ad", "#c2272d", "#616e7c")  # of runs, in their order
STYLES = ("-", "--", ":")  # of quantities, in theirs

PANELS = {
    "Accuracy, validation images": {"clean": "clean_accuracy", "under PGD": "pgd_accuracy"},
    "Loss terms, training images": {"guidance": "guidance", "consistency": "consistency", "loss": "loss"},
}


@dataclass(frozen=True)
class Options:
    """What to draw, and where to."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """folders of runs, their --out"""
    out: Annotated[Path, arg(aliases=("-o",))] = Path("curves.png")
    """a .png file"""


def load(folder: Path) -> list[Row]:
    """The rows of a run."""
    path = folder / "log.csv"
    needed = {"epoch", *(column for columns in PANELS.values() for column in columns.values())}
    try:
        rows = read_log(path)
        if not rows or not all(needed <= row.keys() and row["epoch"] is not None for row in rows):
            raise ValueError("it lacks columns or lines")
    except OSError:
        raise UserError(f"{folder} has no log.csv: name the --out folder of a run that finished an epoch") from None
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not a log of train.py, or broken ({error})") from None
    return rows


def draw(runs: dict[str, list[Row]]) -> Figure:
    """A panel for the accuracies and one for the loss terms: a colour a run, a line style a quantity."""
    figure = Figure(figsize=(11, 4.2), facecolor="white")
    for axes, (title, columns) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for (name, rows), color in zip(runs.items(), COLORS * len(runs), strict=False):
            for (quantity, column), style in zip(columns.items(), STYLES, strict=False):
                points = [(row["epoch"], row[column]) for row in rows if row[column] is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=color, lw=1.8, label=f"{name}: {quantity}")
        axes.set_title(title, loc="left", size=11)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e4e7eb", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.14))
    figure.axes[0].set_ylim(0, 1)
    figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.axes[1].set_ylim(bottom=0)
    return figure


def run(options: Options) -> None:
    """Load, draw, save."""
    if not options.runs:
        raise UserError("RUN must name the folder of one run or more, got none")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out must name a .png file, got {options.out}")
    names = [folder.name for folder in options.runs]
    figure = draw(
        {folder.name if names.count(folder.name) == 1 else str(folder): load(folder) for folder in options.runs}
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")  # grows with the legends
    print(f"saved {options.out}")


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Options, description=__doc__, args=argv)
    try:
        run(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
