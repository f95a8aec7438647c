"""Draw the accuracies and loss terms of one or more runs from their log.csv, to compare them.

    python examples/plot_run.py out/student -o curves.png
    python examples/plot_run.py out/student out/literal out/trades -o curves.png

RUN is what train_clean.py or train_cktat.py was given as --out.
"""

import argparse
import sys
from pathlib import Path

from logbook import Row, read
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from options import UserError, manual
from quickstart_extras import MUTED, png_path

COLORS = ("#2463a8", "#d9730d", "#1a7f4b", "#8e44ad", "#c2272d", "#616e7c")  # of runs, in their order
STYLES = ("-", "--", ":")  # of quantities, in theirs

PANELS = {
    "Accuracy, validation images": {"clean": "clean_accuracy", "under PGD": "pgd_accuracy"},
    "Loss terms, training images": {"guidance": "guidance", "consistency": "consistency", "loss": "loss"},
}


def load(folder: Path) -> list[Row]:
    """The rows of a run."""
    try:
        rows = read(folder / "log.csv")
    except OSError:
        raise UserError(f"{folder} has no log.csv: name the --out folder of a run that finished an epoch") from None
    return rows


def draw(runs: dict[str, list[Row]]) -> Figure:
    """A panel for the accuracies and one for the loss terms: a colour a run, a line style a quantity."""
    figure = Figure(figsize=(11, 4.2), facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (title, columns) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for (name, rows), color in zip(runs.items(), COLORS * len(runs), strict=False):
            for (quantity, column), style in zip(columns.items(), STYLES, strict=False):
                points = [(row["epoch"], row[column]) for row in rows if row[column] is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=color, lw=1.8, label=f"{name}: {quantity}")
        finish(axes, title)
    figure.axes[0].set_ylim(0, 1)
    figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.axes[1].set_ylim(bottom=0)
    return figure


def finish(axes: Axes, title: str) -> None:
    """Titles, grid and legend."""
    axes.set_title(title, loc="left", size=11)
    axes.set_xlabel("epoch", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e7eb", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.14))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = manual(__doc__, operands="RUN [RUN ...]")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, its --out")
    parser.add_argument("-o", "--out", type=png_path, default="curves.png", help="a .png file (default: curves.png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        names = [folder.name for folder in args.runs]
        runs = {folder.name if names.count(folder.name) == 1 else str(folder): load(folder) for folder in args.runs}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(runs).savefig(args.out, dpi=120, bbox_inches="tight")  # grows with the legends
    print(f"saved {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
