"""What the difference of two methods is worth: pairs of runs with the same seed, and Student's t."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

LEVEL = 0.95  # of all the comparisons shown together
_SAME = 1e-3  # points; above what a CSV's six digits round off, below the step of one image in 10,000


@dataclass(frozen=True)
class Interval:
    """A mean paired difference and the ends of its interval, in points: 1 is one percent of the images.

    Args:
        mean, low, high: the ends are NaN where there is no interval.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan

    @property
    def clear(self) -> bool:
        """Whether there is an interval and it leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_differences(records: pd.DataFrame, method: str, against: str, measure: str) -> pd.Series:
    """A method less another in points, run by run with the same data set, network, radius and seed.

    Seeds that only one of the two was run with, or measured with, say nothing about the difference and are left out.

    Raises:
        ValueError: a method has two runs with the same data set, network, radius and seed.
    """
    key = ["dataset", "arch", "eps", "seed"]
    if measure == "test_autoattack":  # accuracies on different images are no pair
        key.append("test_autoattack_images")
    ours, theirs = (
        records[records["method"] == name].dropna(subset=[measure]).set_index(key)[measure]
        for name in (method, against)
    )
    for name, side in ((method, ours), (against, theirs)):
        if not side.index.is_unique:
            first = side.index[side.index.duplicated()][0]
            twice = ", ".join(f"{column} {value}" for column, value in zip(key, first, strict=True))
            raise ValueError(f"records must hold a run once, got two of {name} with {twice}")
    return 100 * (ours - theirs).dropna()


def interval(differences: Sequence[float] | pd.Series, comparisons: int = 1) -> Interval:
    """The mean of paired differences with its two-sided interval by Student's t, Bonferroni-corrected.

    With a probability of at least 95 %, all the intervals that are shown together hold their true differences. They
    cover the randomness of training over seeds: weights, the order of images, attacks. They do not cover the choice of
    the held-out images, which all seeds share, nor that of the data set.

    Args:
        differences: in points, at least one.
        comparisons: how many are shown beside one another, this one included.

    Returns:
        No interval for one pair, nor where all differences are the same: the images are then too few to tell the seeds
        apart, and an interval of no width would claim a certainty that is not there.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or values.std(ddof=1) < _SAME:
        return Interval(float(values.mean()))
    low, high = ttest_1samp(values, 0).confidence_interval(1 - (1 - LEVEL) / comparisons)
    return Interval(float(values.mean()), float(low), float(high))
