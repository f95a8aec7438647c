"""Pictures of the benchmarks' CSVs, one idea each.

python -m benchmarks.plots          (--help explains the options)

    time-<device>.png      time of forward and backward against C, and the copy that nothing can beat
    error-<device>.png     relative error of the KL against the KL itself
    memory-<device>.png    peak memory of forward and backward, a bar for each contender
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import machine
from benchmarks.tables import BOTH, contenders, distinct, measured

Row = dict[str, str]
# Okabe and Ito's colours, told apart by colour-blind readers too. Ours are lines, the others dashed.
STYLES = {
    "usual": ("#000000", "o", "--"),
    "usual, one log_softmax": ("#999999", "v", "--"),
    "usual, log_target": ("#E69F00", "s", "--"),
    "usual, compiled": ("#CC79A7", "^", "--"),
    "ours": ("#0072B2", "D", "-"),
    "ours, compiled": ("#56B4E9", "P", "-"),
    "ours, Triton": ("#009E73", "*", "-"),
    "Liger-Kernel": ("#D55E00", "X", "--"),
}
MEMORY_SHAPE = ("256", "1000")


def canvas(title: str, height: float = 4.4) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def style(name: str) -> dict[str, Any]:
    colour, marker, line = STYLES[name]
    return {"color": colour, "marker": marker, "linestyle": line}


def most_rows(rows: Sequence[Row]) -> str:
    """The batch size that was measured at the most numbers of classes; the larger of two."""
    sizes = {n: len({row["classes"] for row in rows if row["n"] == n}) for (n,) in distinct(rows, "n")}
    return max(sizes, key=lambda n: (sizes[n], int(n)))


def time_against_classes(rows: Sequence[Row]) -> Figure:
    chosen = [r for r in measured(rows) if (r["pass"], r["dtype"], r["logits"]) == (BOTH, "float32", "independent")]
    n = most_rows(chosen)
    chosen = sorted((row for row in chosen if row["n"] == n), key=lambda row: int(row["classes"]))
    figure, axes = canvas(f"Forward and backward, {n} rows, float32: time against the number of classes")
    for name in contenders(chosen):
        own = [row for row in chosen if row["contender"] == name]
        x, y = [int(row["classes"]) for row in own], [float(row["us_50"]) / 1e3 for row in own]
        axes.plot(x, y, label=name, **style(name))
        low, high = ([float(row[f"us_{q}"]) / 1e3 for row in own] for q in (20, 80))
        axes.fill_between(x, low, high, color=STYLES[name][0], alpha=0.15, linewidth=0)
    copy = [row for row in chosen if row["contender"] == "copy"]
    x, y = [int(row["classes"]) for row in copy], [float(row["us_50"]) / 1e3 for row in copy]
    axes.fill_between(x, y, [min(y) / 3] * len(y), color="0.85", linewidth=0, label="faster than a copy")
    axes.set(xscale="log", yscale="log", xlabel="classes C", ylabel="time, ms", xticks=x)
    axes.set_xticks(x, [f"{c:,}" for c in x])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def error_against_kl(rows: Sequence[Row]) -> Figure:
    sweep = [row for row in rows if (row["case"], row["measure"]) == ("sweep", "KL, median")]
    figure, axes = canvas("How wrong a KL is, by how small it is (float32, logits at 30 ± 5)")
    for name in dict.fromkeys(row["contender"] for row in sweep):
        own = [row for row in sweep if row["contender"] == name]
        # A log axis has no zero.
        errors = [max(float(row["value"]), 1e-9) for row in own]
        axes.plot([float(row["true_kl"]) for row in own], errors, label=name, markersize=5, **style(name))
    axes.axhline(1, color="0.6", linewidth=1)
    axes.text(0.99, 1.3, "as large as the KL itself", transform=axes.get_yaxis_transform(), ha="right", color="0.4")
    axes.set(xscale="log", yscale="log", xlabel="true KL, nats (median row)", ylabel="relative error (median row)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    return figure


def memory_bars(rows: Sequence[Row]) -> Figure:
    chosen = [r for r in measured(rows) if (r["pass"], r["dtype"], r["logits"]) == (BOTH, "float32", "independent")]
    shapes = distinct(chosen, "n", "classes")
    shape = MEMORY_SHAPE if MEMORY_SHAPE in shapes else max(shapes, key=lambda s: int(s[0]) * int(s[1]))
    peaks = {r["contender"]: r for r in chosen if (r["n"], r["classes"]) == shape and r["peak_elements"]}
    figure, axes = canvas(f"Peak memory of forward and backward, {shape[0]} × {shape[1]}, float32", height=3)
    names = [name for name in contenders(chosen) if name in peaks][::-1]
    values = [float(peaks[name]["peak_elements"]) for name in names]
    bars = axes.barh(names, values, color=[STYLES[name][0] for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(2, color="0.4", linestyle=":", linewidth=1.5)
    axes.set(xlabel="elements per logit position, beyond the logits (dotted: the two gradients)")
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(f"saved {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="the CSVs' folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    for path in sorted(args.results.glob("loss-*.csv")):
        rows, device = machine.read(path), path.stem.removeprefix("loss-")
        save(time_against_classes(rows), args.results / f"time-{device}.png")
        save(memory_bars(rows), args.results / f"memory-{device}.png")
    for path in sorted(args.results.glob("accuracy-*.csv")):
        save(error_against_kl(machine.read(path)), args.results / f"error-{path.stem.removeprefix('accuracy-')}.png")


if __name__ == "__main__":
    main()
