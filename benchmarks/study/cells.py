"""The cells of the study's tables: accuracies in %, mean ± standard deviation over seeds, and differences in points."""

from collections.abc import Iterable
from math import isnan, nan
from statistics import fmean

import pandas as pd
from scipy.stats import ttest_1samp

from benchmarks.study.grid import SETTINGS

NAMES = {
    "natural": "natural", "pgd20": "PGD-20", "cw30": "CW-30", "apgd": "APGD", "transfer": "transfer",
    "autoattack": "AutoAttack",
}  # fmt: skip
COLLAPSED = 0.2  # natural accuracy of a constant prediction is near 0.1
LEVEL = 0.95


def select(runs: pd.DataFrame, dataset: str, eps: float | None = None, arch: str = "digits") -> pd.DataFrame:
    """Return the rows of a data set. `eps` None: its first radius."""
    own = (runs["dataset"] == dataset) & (runs["arch"] == arch)
    return runs[own & (runs["eps"] == (SETTINGS[dataset].eps[0] if eps is None else eps))]


def by_method(runs: pd.DataFrame, methods: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Return the rows of each method that has any, in the order of `methods`."""
    groups = dict(iter(runs.groupby("method", sort=False)))
    return {method: groups[method] for method in dict.fromkeys(methods) if method in groups}


def paired(ours: pd.DataFrame, theirs: pd.DataFrame, measure: str, *same: str) -> pd.Series:
    """Return the differences of one method's runs from another's, in points, seed by seed.

    Seeds that only one of the two has are left out.

    Args:
        measure: column of runs.csv.
        same: columns that must agree too.

    Raises:
        ValueError: a run is there twice.
    """
    pair = ["dataset", "split_seed", "arch", "eps", "seed", *same]
    if measure == "test_autoattack":  # accuracies on different images are no pair
        pair.append("test_autoattack_images")
    ours, theirs = (runs.dropna(subset=[measure]) for runs in (ours, theirs))
    for runs in (ours, theirs):
        if len(twice := runs[runs.duplicated(pair)]):
            raise ValueError(f"each run must be there once, got two of {twice.iloc[0][['method', *pair]].to_dict()}")
    return 100 * (ours.set_index(pair)[measure] - theirs.set_index(pair)[measure]).dropna()


def interval(differences: pd.Series, comparisons: int = 1) -> tuple[float, float, float]:
    """Return the mean of paired differences and the ends of its two-sided interval, by Student's t.

    All intervals of a table together hold their true differences with a probability of at least LEVEL.

    Args:
        comparisons: the number of intervals in the table, for Bonferroni's correction.

    Returns:
        The mean, and NaN twice for one pair or if all differences are equal: the images are then too few to tell the
        seeds apart, and an interval of no width would claim a certainty.
    """
    mean = float(differences.mean())
    if len(differences) < 2 or differences.std() < 1e-3:  # points; the CSVs have six digits
        return mean, nan, nan
    low, high = ttest_1samp(differences, 0).confidence_interval(1 - (1 - LEVEL) / comparisons)
    return mean, float(low), float(high)


def percent(shares: pd.Series) -> str:
    """Format shares as mean ± standard deviation, in %. A count follows if some of them are missing."""
    known = shares.dropna()
    if known.empty:
        return "-"
    spread = f" ± {100 * known.std():.1f}" if len(known) > 1 else ""
    return f"{100 * fmean(known):.1f}{spread}" + ("" if len(known) == len(shares) else f" (n = {len(known)})")


def signed(value: float) -> str:
    """Format a difference with its sign and one decimal. Zero has no sign, and NaN becomes a dash."""
    text = f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "-" if isnan(value) else "0.0" if text[1:] == "0.0" else text


def difference(differences: pd.Series, comparisons: int = 1) -> str:
    """Format the mean of paired differences and its interval. It is bold if the interval leaves out 0."""
    mean, low, high = interval(differences, comparisons)
    text = signed(mean) if isnan(low) else f"{signed(mean)} [{signed(low)}, {signed(high)}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def level(comparisons: int) -> str:
    """Return the line below a table that says how its intervals are corrected."""
    return (
        f"\n{100 * LEVEL:g} % for all {comparisons} intervals together, by Bonferroni's correction.\n"
        if comparisons
        else ""
    )


def named(text: str, runs: pd.DataFrame) -> str:
    """Append how many runs collapsed to a constant prediction: a mean over them says little."""
    collapsed = int((runs["natural"] < COLLAPSED).sum())
    some = "" if collapsed == len(runs) else f"{collapsed} of {len(runs)} "
    return f"{text} ({some}collapsed)" if collapsed else text


def place(dataset: str, eps: float | None = None) -> str:
    """Name a data set and a radius. `eps` None: its first radius."""
    return f"{dataset}, eps {SETTINGS[dataset].eps[0] if eps is None else eps:g}"


def measured(name: str, runs: pd.DataFrame) -> str:
    """Name a measure and its images. AutoAttack has the first so many test images."""
    images = [f"{count:g}" for count in sorted({*runs["test_autoattack_images"].dropna()})]
    first = f"first {' or '.join(images)} " if images and name == "test_autoattack" else ""
    return f"{NAMES[name.removeprefix('test_')]}, {first}{'test' if name.startswith('test_') else 'validation'}"


def counts(groups: Iterable[pd.DataFrame]) -> str:
    """Return the number of runs of each group, or one number if all are equal."""
    numbers = [str(len(runs)) for runs in groups]
    return numbers[0] if len({*numbers}) == 1 else " / ".join(numbers)
