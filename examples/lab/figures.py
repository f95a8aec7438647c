"""The study's figures, each from records to a picture; None where the runs that it shows are not there yet."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from quickstart_extras import BLUE, INK, MUTED, ORANGE

from lab import labels, runs
from lab.claims import Claim, measures
from lab.records import Epoch, Record
from lab.selection import by_method, values
from lab.statistics import mean, sd
from lab.tables import measured, radius

# Okabe and Ito's, which people with any colour vision tell apart; without the yellow, too pale for lines on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
CLEAN, ROBUST = BLUE, ORANGE


def sweeps(records: Sequence[Record], dataset: str = "digits") -> Figure | None:
    """Accuracy against tau on the left, against beta on the right: mean, ±1 sd over seeds, and a dot a seed."""
    found = by_method(records, dataset, runs.SETTINGS[dataset].eps[0])
    panels = {"tau": dict(zip(runs.TAUS, runs.TAU_SWEEP, strict=True)),
              "beta": dict(zip(runs.BETAS, runs.BETA_SWEEP, strict=True))}  # fmt: skip
    here = {name: {x: found[m] for x, m in of.items() if m in found} for name, of in panels.items()}
    if min(len(of) for of in here.values()) < 2:
        return None
    figure = _figure(10, 4)
    for axes, (name, of) in zip(figure.subplots(1, 2, sharey=True), here.items(), strict=True):
        for measure, label, color in (("natural", "natural", CLEAN), ("apgd", "under APGD", ROBUST)):
            by_x = {x: values(seeds, measure) for x, seeds in of.items()}
            means = [mean(seeds) for seeds in by_x.values()]
            spreads = [sd(seeds) or 0 for seeds in by_x.values()]
            axes.plot(list(by_x), means, color=color, lw=2, label=label)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(list(by_x), low, high, color=color, alpha=0.18, lw=0)
            dots = [(x, y) for x, seeds in by_x.items() for y in seeds]
            axes.scatter(*zip(*dots, strict=True), s=9, color=color, alpha=0.6, lw=0)
        _finish(axes, f"{dataset}, eps {radius(runs.SETTINGS[dataset].eps[0])}: by {name}", name)
    figure.axes[0].set_ylabel("accuracy, validation images", color=MUTED)
    figure.axes[0].legend(frameon=False, labelcolor=INK)
    return figure


def trade_off(records: Sequence[Record], claims: Sequence[Claim]) -> Figure | None:
    """Natural against robust accuracy, a panel a data set, a point a method; the bars are ±1 sd over seeds.

    On the test images of a data set once they have been read, for what the claims about it are of and for the methods
    that they are about; else on the validation images: the axes say which. Methods of which a run has less than half
    of the best mean in either are named in a line under the panel.
    """
    panels = {}
    for dataset, setting in runs.SETTINGS.items():
        found = by_method(records, dataset, setting.eps[0])
        for robust in (*measures(dataset, claims), "apgd"):
            if shown := {method: of for method in _order() if values(of := found.get(method, []), robust)}:
                panels[dataset] = shown, robust
                break
    if not panels:
        return None
    figure = _figure(5.6 * len(panels), 4.8)
    plots = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (dataset, (shown, robust)) in zip(plots, panels.items(), strict=True):
        both = ("test_natural" if robust.startswith("test_") else "natural", robust)
        points = {method: [values(of, measure) for measure in both] for method, of in shown.items()}
        along, up = (measured(name, [record for of in shown.values() for record in of]) for name in both)
        # They would squeeze all others into a corner.
        half = [max(mean(xy[i]) for xy in points.values()) / 2 for i in (0, 1)]
        outside = {
            m: xy for m, xy in points.items() if any(min(of) < of_best for of, of_best in zip(xy, half, strict=True))
        }
        for method, (x, y) in points.items():
            if method not in outside:
                fill = "white" if method in runs.CONTROLS else None
                bars = {"xerr": sd(x) or 0, "yerr": sd(y) or 0, "elinewidth": 0.9}
                axes.errorbar(mean(x), mean(y), fmt="o", ms=6, mfc=fill, color=_color(method), label=method, **bars)
        _finish(axes, f"{dataset}, eps {radius(runs.SETTINGS[dataset].eps[0])}", f"accuracy: {along} images")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        axes.set_ylabel(f"accuracy: {up} images", color=MUTED)
        axes.margins(0.14)
        if outside:
            listed = ", ".join(f"{method} {_pair(*xy)}" for method, xy in outside.items())
            axes.text(0, -0.17, f"Not shown: {listed}", transform=axes.transAxes, color=MUTED, size=8, va="top")
    labels.beside_points(figure)
    return figure


def collapse_and_rescue(
    curves: Sequence[Epoch], dataset: str, eps: float, collapsing: str = "literal", rescued: str = "adaptive"
) -> Figure | None:
    """Clean and PGD accuracy by epoch of two methods, side by side: thin a seed, bold the mean."""
    found = by_method(curves, dataset, eps)
    if collapsing not in found or rescued not in found:
        return None
    figure = _figure(10, 4)
    for axes, method in zip(figure.subplots(1, 2, sharey=True), (collapsing, rescued), strict=True):
        _draw(axes, found[method], "clean_accuracy", CLEAN, "clean")
        _draw(axes, found[method], "pgd_accuracy", ROBUST, "under PGD-10")
        _finish(axes, f"{method}: {runs.METHODS[method].about}", "epoch")
    figure.axes[0].set_ylim(0, 1.03)
    figure.axes[0].set_ylabel(f"accuracy, validation images of {dataset}, eps {radius(eps)}", color=MUTED)
    figure.axes[1].legend(frameon=False, labelcolor=INK, loc="lower right")
    return figure


def errors_per_epoch(curves: Sequence[Epoch], dataset: str, eps: float) -> Figure | None:
    """Natural error on the left, robust error on the right, by epoch, for each main method: does the one rise as the
    other falls? Thin a seed, bold the mean. The left scale is logarithmic: natural errors differ by factors."""
    found = by_method(curves, dataset, eps)
    shown = [method for method in runs.MAIN if method in found]
    if not shown:
        return None
    figure = _figure(11, 4.4)
    panels = {"Natural error": "clean_accuracy", "Robust error, PGD-10": "pgd_accuracy"}
    for axes, (title, measure) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for method in shown:
            _draw(axes, found[method], measure, _color(method), method, error=True)
        _finish(axes, f"{title}: {dataset}, eps {radius(eps)}", "epoch")
    left = figure.axes[0]
    left.set_yscale("log", nonpositive="mask")  # no error among few images is nothing to draw
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FuncFormatter(_percent))  # a new scale brings its own
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel("error, validation images", color=MUTED)
    figure.axes[1].legend(frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def weights(
    curves: Sequence[Epoch], dataset: str, eps: float, methods: tuple[str, str] = ("adaptive", "ramp")
) -> Figure | None:
    """How softmax(S(x'))[y] spreads over the images, by epoch: percentiles, each the mean over seeds.

    adaptive_beta's weight of an image is beta times that. A method with one beta for all images is beside it to
    compare: what its weights would be.
    """
    found = by_method(curves, dataset, eps)
    if any(method not in found for method in methods):
        return None
    figure = _figure(10, 4)
    for axes, method in zip(figure.subplots(1, 2, sharey=True), methods, strict=True):
        bands = {p: _means(found[method], f"label_probability_p{p:02}") for p in (5, 25, 50, 75, 95)}
        epochs = list(bands[50])
        for low, high, alpha in ((5, 95, 0.18), (25, 75, 0.4)):
            band = (list(bands[low].values()), list(bands[high].values()))
            axes.fill_between(epochs, *band, color=BLUE, alpha=alpha, lw=0, label=f"{low} - {high} % of the images")
        axes.plot(epochs, list(bands[50].values()), color=BLUE, lw=2, label="median")
        _finish(axes, f"{method}: {dataset}, eps {radius(eps)}", "epoch")
        axes.yaxis.set_major_formatter("{x:g}")  # a weight, no share of images
    figure.axes[0].set_ylim(0, 1.03)
    figure.axes[0].set_ylabel("softmax(S(x'))[y], validation images", color=MUTED)
    figure.axes[1].legend(frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# What is drawn.


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Axes, title: str, below: str) -> None:
    """Titles, grid, frame; accuracies upwards in %."""
    axes.set_title(title, loc="left", size=10, color=INK)
    axes.set_xlabel(below, color=MUTED)
    if below in ("epoch", "tau", "beta"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.grid(axis="y", color="#e4e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")


def _draw(axes: Axes, epochs: Sequence[Epoch], measure: str, color: str, label: str, error: bool = False) -> None:
    """A thin line a seed, then the bold mean, whose label is the legend's; an error is 1 less the accuracy."""

    def show(points: dict[int, float]) -> list[float]:
        return [1 - value if error else value for value in points.values()]

    for seed in dict.fromkeys(row.seed for row in epochs):
        line = {row.epoch: getattr(row, measure) for row in epochs if row.seed == seed}
        axes.plot(list(line), show(line), color=color, lw=0.7, alpha=0.4)
    line = _means(epochs, measure)
    axes.plot(list(line), show(line), color=color, lw=2.2, label=label)


def _means(epochs: Sequence[Epoch], measure: str) -> dict[int, float]:
    """The mean over seeds, by epoch, of the epochs that every seed has: a run that stopped early must not bend it."""
    seeds = {row.seed for row in epochs}
    by_epoch = {number: [getattr(row, measure) for row in epochs if row.epoch == number]
                for number in sorted({row.epoch for row in epochs})}  # fmt: skip
    return {number: mean(of) for number, of in by_epoch.items() if len(of) == len(seeds)}


def _percent(share: float, _: int | None = None) -> str:
    """Of a tick, with as many decimals as it needs: an axis can span half a point."""
    return f"{100 * share:.4g} %"


def _order() -> list[str]:
    return list(dict.fromkeys((*runs.MAIN, *runs.CONTROLS)))


def _color(method: str) -> str:
    """The same in every figure. Controls begin again at the first: their points are hollow."""
    of = runs.MAIN if method in runs.MAIN else runs.CONTROLS
    return PALETTE[of.index(method) % len(PALETTE)]


def _pair(x: Iterable[float], y: Iterable[float]) -> str:
    return " / ".join(f"{100 * mean(list(of)):.1f}" for of in (x, y))
