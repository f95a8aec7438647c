"""The study's figures, each from a table to a picture; None where the runs that it shows are not there yet."""

from collections.abc import Sequence

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.study import grid
from benchmarks.study.cells import measured, place
from benchmarks.study.claims import Claim, measures
from benchmarks.study.records import by_method, select

INK, MUTED, CLEAN, ROBUST = "#1f2933", "#616e7c", "#2463a8", "#d9730d"
styled = matplotlib.rc_context({
    "axes.axisbelow": True, "axes.edgecolor": "#cbd2d9", "axes.grid": True, "axes.grid.axis": "y",
    "axes.labelcolor": MUTED, "axes.spines.right": False, "axes.spines.top": False, "axes.titlecolor": INK,
    "axes.titlelocation": "left", "axes.titlesize": 10, "figure.constrained_layout.use": True,
    "figure.facecolor": "white", "grid.color": "#e4e7eb", "grid.linewidth": 0.8, "legend.frameon": False,
    "legend.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
})  # fmt: skip
# Okabe and Ito's, which people with any colour vision tell apart; without the yellow, too pale for lines on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g} %")  # as many decimals as needed: an axis can span little
OUTSIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # of a legend: right of its panel


@styled
def sweeps(records: pd.DataFrame) -> Figure | None:
    """Accuracy on digits against tau on the left, against beta on the right: mean, ±1 sd and a dot for each seed."""
    found = select(records, "digits")
    panels = {
        name: found.assign(x=found["method"].map(sweep)).dropna(subset=["x"]).sort_values(["x", "seed"])
        for name, sweep in (("tau", grid.TAU_SWEEP), ("beta", grid.BETA_SWEEP))
    }
    if min(points["x"].nunique() for points in panels.values()) < 2:
        return None
    figure = Figure((10, 4))
    for axes, (name, points) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for measure, label, color in (("natural", "natural", CLEAN), ("apgd", "under APGD", ROBUST)):
            mean, sd = (points.groupby("x")[measure].agg(of).fillna(0) for of in ("mean", "std"))
            axes.plot(mean.index, mean, color=color, lw=2, label=label)
            axes.fill_between(mean.index, mean - sd, mean + sd, color=color, alpha=0.18, lw=0)
            axes.scatter(points["x"], points[measure], s=9, color=color, alpha=0.6, lw=0)
        _finish(axes, f"{place('digits')}: by {name}", name)
    figure.axes[0].set_ylabel("accuracy, validation images")
    figure.axes[0].legend()
    return figure


@styled
def trade_off(records: pd.DataFrame, claims: Sequence[Claim]) -> Figure | None:
    """Natural against robust accuracy, a panel a data set, a point a method; the bars are ±1 sd over seeds.

    On the test images of a data set once they have been read, for what the claims about it are of and for the methods
    that they are about; else on the validation images: the axes say which. Methods with less than half of the best mean
    in either are named in a line under the panel: they would squeeze all others into a corner.
    """
    panels = {}
    for dataset in grid.SETTINGS:
        found = select(records, dataset)
        for robust in (*measures(dataset, claims), "apgd"):
            if shown := by_method(found.dropna(subset=[robust]), (*grid.MAIN, *grid.CONTROLS)):
                panels[dataset] = shown, ["test_natural" if robust.startswith("test_") else "natural", robust]
                break
    if not panels:
        return None
    figure = Figure((6.4 * len(panels), 4.8))
    plots = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (dataset, (shown, both)) in zip(plots, panels.items(), strict=True):
        runs = pd.concat(shown.values())
        mean, sd, low = (runs.groupby("method", sort=False)[both].agg(of) for of in ("mean", "std", "min"))
        inside = (low >= mean.max() / 2).all(axis=1)
        for method in mean.index[inside]:
            (x, y), (xerr, yerr) = mean.loc[method], sd.loc[method].fillna(0)
            axes.errorbar(x, y, xerr=xerr, yerr=yerr, label=method, elinewidth=0.9, ms=6, **_look(method))
        along, up = (f"accuracy: {measured(name, runs)} images" for name in both)
        axes.set(title=place(dataset), xlabel=along, ylabel=up)
        axes.xaxis.set(major_locator=MaxNLocator(5), major_formatter=PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.legend(fontsize=8, **OUTSIDE)
        if outside := [f"{method} {100 * x:.1f} / {100 * y:.1f}" for method, (x, y) in mean[~inside].T.items()]:
            text = f"Not shown: {', '.join(outside)}"
            axes.text(0, -0.17, text, transform=axes.transAxes, color=MUTED, size=8, va="top")
    return figure


@styled
def collapse_and_rescue(curves: pd.DataFrame, dataset: str) -> Figure | None:
    """Clean and PGD accuracy by epoch of two methods, side by side: thin a seed, bold the mean."""
    if len(found := by_method(select(curves, dataset), ("literal", "adaptive"))) < 2:
        return None
    figure = Figure((10, 4))
    for axes, (method, epochs) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        _draw(axes, epochs, "clean_accuracy", CLEAN, "clean")
        _draw(axes, epochs, "pgd_accuracy", ROBUST, "under PGD-10")
        _finish(axes, f"{method}: {grid.METHODS[method].about}", "epoch")
    figure.axes[0].set(ylim=(0, 1.03), ylabel=f"accuracy, validation images of {place(dataset)}")
    figure.axes[1].legend(loc="lower right")
    return figure


@styled
def errors_per_epoch(curves: pd.DataFrame, dataset: str) -> Figure | None:
    """Natural error on the left, robust error on the right, by epoch, for each main method: does one rise as the other
    falls? Thin a seed, bold the mean. The left scale is logarithmic: natural errors differ by factors."""
    errors = curves.assign(natural=1 - curves["clean_accuracy"], robust=1 - curves["pgd_accuracy"])
    if not (found := by_method(select(errors, dataset), grid.MAIN)):
        return None
    figure = Figure((11, 4.4))
    panels = {"Natural error": "natural", "Robust error, PGD-10": "robust"}
    for axes, (title, error) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for method, epochs in found.items():
            _draw(axes, epochs, error, _look(method)["color"], method)
        _finish(axes, f"{title}: {place(dataset)}", "epoch")
    left = figure.axes[0]
    left.set_yscale("log", nonpositive="mask")  # no error among few images is nothing to draw
    # The scale has brought ticks of its own.
    left.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=PERCENT, minor_formatter=NullFormatter())
    left.set_ylabel("error, validation images")
    figure.axes[1].legend(**OUTSIDE)
    return figure


@styled
def weights(curves: pd.DataFrame, dataset: str) -> Figure | None:
    """How softmax(S(x'))[y] spreads over the images, by epoch: percentiles, each the mean over seeds.

    The adaptive weight of an image is beta times that. A method with one beta for all images is beside it to compare:
    what its weights would be.
    """
    if len(found := by_method(select(curves, dataset), ("adaptive", "ramp"))) < 2:
        return None
    figure = Figure((10, 4))
    for axes, (method, epochs) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        at = {p: _mean(epochs, f"label_probability_p{p:02}") for p in (5, 25, 50, 75, 95)}
        for low, high, alpha in ((5, 95, 0.18), (25, 75, 0.4)):
            label = f"{low} - {high} % of the images"
            axes.fill_between(at[low].index, at[low], at[high], color=CLEAN, alpha=alpha, lw=0, label=label)
        axes.plot(at[50].index, at[50], color=CLEAN, lw=2, label="median")
        _finish(axes, f"{method}: {place(dataset)}", "epoch")
        axes.yaxis.set_major_formatter("{x:g}")  # a weight, no share of images
    figure.axes[0].set(ylim=(0, 1.03), ylabel="softmax(S(x'))[y], validation images")
    figure.axes[1].legend(**OUTSIDE)
    return figure


def _finish(axes: Axes, title: str, below: str) -> None:
    """Titles and ticks: whole numbers along, accuracies in % upwards."""
    axes.set(title=title, xlabel=below)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PERCENT)


def _draw(axes: Axes, epochs: pd.DataFrame, measure: str, color: str, label: str) -> None:
    """A thin line a seed, then the bold mean, whose label is the legend's."""
    for _, line in epochs.groupby("seed"):
        axes.plot(line["epoch"], line[measure], color=color, lw=0.7, alpha=0.4)
    mean = _mean(epochs, measure)
    axes.plot(mean.index, mean, color=color, lw=2.2, label=label)


def _mean(epochs: pd.DataFrame, measure: str) -> pd.Series:
    """Over seeds, by epoch, of the epochs that every seed has: a run that stopped early must not bend it."""
    return epochs.pivot(index="epoch", columns="seed", values=measure).mean(axis=1, skipna=False).dropna()


def _look(method: str) -> dict[str, str | None]:
    """Of a method's points and lines, the same in every figure; those of controls are hollow."""
    control = method in grid.CONTROLS
    index = (grid.CONTROLS if control else grid.MAIN).index(method)
    shape = ("D" if index >= len(PALETTE) else "s") if control else "o"
    return {"color": PALETTE[index % len(PALETTE)], "fmt": shape, "mfc": "white" if control else None}
