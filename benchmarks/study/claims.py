"""The claims about the test images, written down before any test image is read.

Settings and recipes are chosen on the validation images. A claim that is made afterwards is chosen by the test numbers
too, so they no longer test it. A claim that fails stays here.
"""

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.study.grid import Run


class Claim(NamedTuple):
    """One method has a higher accuracy than another, with the network "digits"."""

    dataset: str
    eps: float
    better: str
    worse: str
    measure: str  # a column of runs.csv
    seeds: range  # these seeds judge it, all of them and no others, so that nobody stops where it looks good


# On digits the measure is AutoAttack. On mnist5k it is APGD: the differences are smaller, and AutoAttack on all test
# images takes too long.
FIRST = (
    Claim("digits", 0.2, "adaptive", "literal", "test_autoattack", range(5)),
    Claim("digits", 0.2, "adaptive", "trades", "test_autoattack", range(8)),
    Claim("digits", 0.2, "adaptive", "pgd-at", "test_autoattack", range(8)),
    Claim("digits", 0.2, "adaptive-cold", "pgd-at", "test_autoattack", range(8)),
    Claim("digits", 0.2, "pgd-at-weighted-cold", "pgd-at", "test_autoattack", range(8)),
    Claim("mnist5k", 0.3, "adaptive-cold", "trades", "test_apgd", range(5)),
    Claim("mnist5k", 0.3, "adaptive-cold", "pgd-at", "test_apgd", range(10)),
    Claim("mnist5k", 0.3, "pgd-at-weighted-cold", "pgd-at", "test_apgd", range(10)),
)
# The validation images of the replication picked this method. The seeds are fresh. The intervals are corrected for the
# claims of both rounds: a second round makes no claim cheaper.
SECOND = (
    Claim("digits", 0.2, "adaptive-cold-clean-label", "pgd-at", "test_autoattack", range(10, 20)),
    Claim("mnist5k", 0.3, "adaptive-cold-clean-label", "pgd-at", "test_apgd", range(10, 20)),
)
CLAIMS = (*FIRST, *SECOND)


def claimed(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that judge a claim. The test images of all others stay unread."""
    sides = [(claim, method) for claim in CLAIMS for method in (claim.better, claim.worse)]
    judges = {Run(own.dataset, "digits", method, own.eps, seed) for own, method in sides for seed in own.seeds}
    return [run for run in runs if run in judges]
