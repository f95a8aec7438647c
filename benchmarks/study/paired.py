"""What the difference of two methods is worth: pairs of runs with the same seed, and Student's t."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
from scipy.stats import ttest_1samp

LEVEL = 0.95  # of all the comparisons shown together
_SAME = 1e-3  # points; above what a CSV's six digits round off, below the step of one image in 10,000


class Interval(NamedTuple):
    """A mean paired difference and the ends of its interval, in points: 1 is one percent of the images."""

    mean: float
    low: float = math.nan  # as the other end: where there is no interval
    high: float = math.nan


def paired_differences(ours: pd.DataFrame, theirs: pd.DataFrame, measure: str, same: Iterable[str] = ()) -> pd.Series:
    """One method's runs less another's, in points: run by run with the same data, network, radius and seed.

    Seeds that only one of the two was run with, or measured with, say nothing about the difference and are left out.

    Args:
        same: what else must be the same.

    Raises:
        ValueError: a run is there twice.
    """
    pair = ["dataset", "split_seed", "arch", "eps", "seed", *same]
    if measure == "test_autoattack":  # accuracies on different images are no pair
        pair.append("test_autoattack_images")
    ours, theirs = (runs.dropna(subset=[measure]) for runs in (ours, theirs))
    for side in (ours, theirs):
        if len(again := side[side.duplicated(pair)]):
            twice = again.iloc[0]
            run = ", ".join(f"{column} {twice[column]}" for column in pair)
            raise ValueError(f"records must hold a run once, got two of {twice['method']} with {run}")
    return 100 * (ours.set_index(pair)[measure] - theirs.set_index(pair)[measure]).dropna()


def interval(differences: Iterable[float], comparisons: int = 1) -> Interval:
    """The mean of paired differences with its two-sided interval by Student's t, Bonferroni-corrected.

    With a probability of at least 95 %, all the intervals that are shown together hold their true differences. They
    cover the randomness of training over seeds: weights, the order of images, attacks. They do not cover the choice of
    the held-out images, which all seeds share, nor that of the data set.

    Args:
        differences: in points; of none, the mean is NaN.
        comparisons: how many are shown beside one another, this one included.

    Returns:
        No interval for one pair, nor where all differences are the same: the images are then too few to tell the seeds
        apart, and an interval of no width would claim a certainty that is not there.
    """
    values = pd.Series(differences, dtype=float)
    if len(values) < 2 or values.std() < _SAME:
        return Interval(float(values.mean()))
    low, high = ttest_1samp(values, 0).confidence_interval(1 - (1 - LEVEL) / comparisons)
    return Interval(float(values.mean()), float(low), float(high))
