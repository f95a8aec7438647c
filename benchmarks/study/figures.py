"""The figures of the study, from runs.csv and curves.csv."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.study import grid
from benchmarks.study.claims import FIRST
from benchmarks.study.tables import by_method, measured, place, select

INK, MUTED, CLEAN, ROBUST = "#1f2933", "#616e7c", "#2463a8", "#d9730d"
STYLE = {
    "axes.axisbelow": True, "axes.edgecolor": "#cbd2d9", "axes.grid": True, "axes.grid.axis": "y",
    "axes.labelcolor": MUTED, "axes.spines.right": False, "axes.spines.top": False, "axes.titlecolor": INK,
    "axes.titlelocation": "left", "axes.titlesize": 10, "figure.constrained_layout.use": True,
    "figure.facecolor": "white", "grid.color": "#e4e7eb", "grid.linewidth": 0.8, "legend.frameon": False,
    "legend.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
}  # fmt: skip
# Okabe and Ito's colours, which people with any colour vision tell apart, without the yellow.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g} %")
OUTSIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # places a legend right of its panel


def all_figures(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, Figure]:
    """Draw every figure, by the name of its file. STYLE must be matplotlib's."""
    drawn = {"sweeps": sweeps(runs), "trade_off": trade_off(runs)}
    for draw in (collapse_and_rescue, errors_per_epoch, weights):
        drawn |= {f"{draw.__name__}-{dataset}": draw(curves, dataset) for dataset in grid.SETTINGS}
    return drawn


def sweeps(runs: pd.DataFrame) -> Figure:
    """Draw accuracy on digits against tau and against beta: the mean, ±1 sd, and a dot per seed."""
    figure, found = Figure((10, 4)), select(runs, "digits")
    both = (("tau", grid.TAU_SWEEP), ("beta", grid.BETA_SWEEP))
    for axes, (name, values) in zip(figure.subplots(1, 2, sharey=True), both, strict=True):
        points = found.assign(x=found["method"].map(values)).dropna(subset=["x"]).sort_values(["x", "seed"])
        for measure, label, color in (("natural", "natural", CLEAN), ("apgd", "under APGD", ROBUST)):
            mean, sd = (points.groupby("x")[measure].agg(of).fillna(0) for of in ("mean", "std"))
            axes.plot(mean.index, mean, color=color, lw=2, label=label)
            axes.fill_between(mean.index, mean - sd, mean + sd, color=color, alpha=0.18, lw=0)
            axes.scatter(points["x"], points[measure], s=9, color=color, alpha=0.6, lw=0)
        _finish(axes, f"{place('digits')}: by {name}", name)
    figure.axes[0].set_ylabel("accuracy, validation images")
    figure.axes[0].legend()
    return figure


def trade_off(runs: pd.DataFrame) -> Figure:
    """Draw natural against robust accuracy on test images, one point per method that was read, with bars of ±1 sd.

    Methods below half of the best mean are named in a line below. They would squeeze all others into a corner.
    """
    figure = Figure((6.4 * len(grid.SETTINGS), 4.8))
    for axes, dataset in zip(figure.subplots(1, len(grid.SETTINGS)), grid.SETTINGS, strict=True):
        both = ["test_natural", next(claim.measure for claim in FIRST if claim.dataset == dataset)]
        found = select(runs, dataset).dropna(subset=both[1:])
        found = pd.concat(by_method(found, grid.SHOWN).values())
        mean, sd, low = (found.groupby("method", sort=False)[both].agg(of) for of in ("mean", "std", "min"))
        inside = (low >= mean.max() / 2).all(axis=1)
        for method in mean.index[inside]:
            (x, y), (xerr, yerr) = mean.loc[method], sd.loc[method].fillna(0)
            axes.errorbar(x, y, xerr=xerr, yerr=yerr, label=method, elinewidth=0.9, ms=6, **_look(method))
        along, up = (f"accuracy: {measured(name, found)} images" for name in both)
        axes.set(title=place(dataset), xlabel=along, ylabel=up)
        axes.xaxis.set(major_locator=MaxNLocator(5), major_formatter=PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.legend(fontsize=8, **OUTSIDE)
        if outside := [f"{method} {100 * x:.1f} / {100 * y:.1f}" for method, (x, y) in mean[~inside].T.items()]:
            text = f"Not shown: {', '.join(outside)}"
            axes.text(0, -0.17, text, transform=axes.transAxes, color=MUTED, size=8, va="top")
    return figure


def collapse_and_rescue(curves: pd.DataFrame, dataset: str) -> Figure:
    """Draw clean and PGD accuracy by epoch of the literal loss and of `adaptive`, side by side."""
    figure, found = Figure((10, 4)), by_method(select(curves, dataset), ("literal", "adaptive"))
    for axes, (method, epochs) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        _draw(axes, epochs, "clean_accuracy", CLEAN, "clean")
        _draw(axes, epochs, "pgd_accuracy", ROBUST, "under PGD-10")
        _finish(axes, f"{method}: {grid.METHODS[method].about}", "epoch")
    figure.axes[0].set(ylim=(0, 1.03), ylabel=f"accuracy, validation images of {place(dataset)}")
    figure.axes[1].legend(loc="lower right")
    return figure


def errors_per_epoch(curves: pd.DataFrame, dataset: str) -> Figure:
    """Draw natural and robust error by epoch for each main method: does one rise as the other falls?"""
    errors = curves.assign(natural=1 - curves["clean_accuracy"], robust=1 - curves["pgd_accuracy"])
    figure, found = Figure((11, 4.4)), by_method(select(errors, dataset), grid.MAIN)
    panels = {"Natural error": "natural", "Robust error, PGD-10": "robust"}
    for axes, (title, error) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for method, epochs in found.items():
            _draw(axes, epochs, error, _look(method)["color"], method)
        _finish(axes, f"{title}: {place(dataset)}", "epoch")
    left = figure.axes[0]
    left.set_yscale("log", nonpositive="mask")  # natural errors differ by factors, and an error of 0 is not drawn
    left.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=PERCENT, minor_formatter=NullFormatter())
    left.set_ylabel("error, validation images")
    figure.axes[1].legend(**OUTSIDE)
    return figure


def weights(curves: pd.DataFrame, dataset: str) -> Figure:
    """Draw percentiles of softmax(S(x'))[y] over the images, by epoch. The adaptive beta_i is beta times that."""
    figure, found = Figure((10, 4)), by_method(select(curves, dataset), ("adaptive", "ramp"))
    for axes, (method, epochs) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        at = {p: _over_seeds(epochs, f"label_probability_p{p:02}") for p in (5, 25, 50, 75, 95)}
        for low, high, alpha in ((5, 95, 0.18), (25, 75, 0.4)):
            label = f"{low} - {high} % of the images"
            axes.fill_between(at[low].index, at[low], at[high], color=CLEAN, alpha=alpha, lw=0, label=label)
        axes.plot(at[50].index, at[50], color=CLEAN, lw=2, label="median")
        _finish(axes, f"{method}: {place(dataset)}", "epoch")
        axes.yaxis.set_major_formatter("{x:g}")
    figure.axes[0].set(ylim=(0, 1.03), ylabel="softmax(S(x'))[y], validation images")
    figure.axes[1].legend(**OUTSIDE)
    return figure


def _finish(axes: Axes, title: str, below: str) -> None:
    axes.set(title=title, xlabel=below)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PERCENT)


def _draw(axes: Axes, epochs: pd.DataFrame, measure: str, color: str | None, label: str) -> None:
    """Draw a thin line per seed, then the bold mean."""
    for _, line in epochs.groupby("seed"):
        axes.plot(line["epoch"], line[measure], color=color, lw=0.7, alpha=0.4)
    mean = _over_seeds(epochs, measure)
    axes.plot(mean.index, mean, color=color, lw=2.2, label=label)


def _over_seeds(epochs: pd.DataFrame, measure: str) -> pd.Series:
    """Return the mean by epoch, of the epochs that every seed has."""
    return epochs.pivot(index="epoch", columns="seed", values=measure).mean(axis=1, skipna=False).dropna()


def _look(method: str) -> dict[str, str | None]:
    """Return the style of a method, the same in every figure. Controls are hollow."""
    control = method in grid.CONTROLS
    index = (grid.CONTROLS if control else grid.MAIN).index(method)
    shape = ("D" if index >= len(PALETTE) else "s") if control else "o"
    return {"color": PALETTE[index % len(PALETTE)], "fmt": shape, "mfc": "white" if control else None}
