"""Means over seeds, and what the differences of two methods are worth."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t

from lab.records import Record

LEVEL = 0.95  # of all the comparisons shown together
_SAME = 1e-3  # points; above what a CSV's six digits round off, below the step of one image in 10,000


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return fmean(values)


def sd(values: Sequence[float]) -> float | None:
    """The standard deviation of the population that the values are a sample of; none from fewer than two."""
    return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with the ends of its interval, in points: 1 is one percent of the images.

    Args:
        mean, low, high: the ends are None where there is no interval.
        n: pairs.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Whether there is an interval and it leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_differences(records: Iterable[Record], method: str, against: str, measure: str) -> list[float]:
    """A method less another, run by run with the same data set, network, radius and seed.

    Seeds that only one of the two was run with say nothing about the difference, and are left out.

    Args:
        records: of any methods.
        measure: a Record's accuracy by its name. Runs that lack it are left out.

    Returns:
        Points, sorted by what the pairs share.

    Raises:
        ValueError: a method has two runs with the same data set, network, radius and seed.
    """
    sides: dict[str, dict[tuple[object, ...], float]] = {method: {}, against: {}}
    for record in records:
        value = getattr(record, measure)
        if record.method in sides and value is not None:
            key: tuple[object, ...] = (record.dataset, record.arch, float(f"{record.eps:.6g}"), record.seed)
            if measure == "test_autoattack":  # two accuracies on other images are no pair
                key += (record.test_autoattack_images,)
            if key in sides[record.method]:
                raise ValueError(
                    f"records must hold a run once, got two of {record.method} with {record.dataset}, {record.arch}, "
                    f"eps {record.eps:g} and seed {record.seed}"
                )
            sides[record.method][key] = value
    return [100 * (sides[method][key] - sides[against][key]) for key in sorted(sides[method].keys() & sides[against])]


def interval(differences: Sequence[float], comparisons: int = 1) -> Difference:
    """The mean of paired differences with its two-sided interval by Student's t, Bonferroni-corrected.

    mean +- q sd / sqrt(n), with q the quantile of t with n - 1 degrees of freedom at 1 - 0.05 / (2 comparisons): with a
    probability of at least 95 %, all the intervals shown together hold their true differences.

    It covers the randomness of training over seeds: weights, the order of images, attacks. That is, it says where the
    mean difference would settle with more and more seeds *on these very images*. It does not cover the choice of the
    held-out images, which all seeds share, nor the data set: others of either can differ by more.

    Args:
        differences: in points, at least one.
        comparisons: how many are shown beside one another, this one included.

    Returns:
        Without interval where n = 1, and where all differences are the same: the images are then too few to tell the
        seeds apart, and an interval of no width would claim a certainty that isn't there.
    """
    if comparisons < 1:
        raise ValueError(f"comparisons must be at least 1, got {comparisons}")
    center, spread, n = mean(differences), sd(differences), len(differences)
    if spread is None or spread < _SAME:
        return Difference(center, None, None, n)
    half = float(t.ppf(1 - (1 - LEVEL) / (2 * comparisons), n - 1)) * spread / math.sqrt(n)
    return Difference(center, center - half, center + half, n)
