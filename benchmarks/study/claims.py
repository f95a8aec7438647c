"""What the study claims of the test images, written down before any of them is read.

Settings and recipes are chosen on the validation images. A claim that is made afterwards, with the test numbers on the
table, is chosen by them too, and they no longer test it. So the claims come first, and one that fails stays.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.study.grid import METHODS, SETTINGS, Run

MEASURES = ("test_natural", "test_pgd20", "test_apgd", "test_autoattack")  # columns of runs.csv


@dataclass(frozen=True)
class Claim:
    """One method has a higher accuracy than another, with the data set's own network."""

    dataset: str
    eps: float
    better: str
    worse: str
    measure: str  # one of MEASURES
    seeds: range  # it is judged when all are there and, so that nobody stops where it looks good, by no others

    def __post_init__(self) -> None:
        for name, known in (("dataset", SETTINGS), ("better", METHODS), ("worse", METHODS), ("measure", MEASURES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")

    def about(self, run: Run) -> bool:
        """Whether it is judged by this run."""
        own = run.arch == SETTINGS[run.dataset].arch and run.seed in self.seeds
        return own and (run.dataset, run.eps) == (self.dataset, self.eps) and run.method in (self.better, self.worse)


# On digits, of AutoAttack. On mnist5k the differences are smaller, and AutoAttack takes too long for more than a few
# images of a run: there, of APGD on all of them.
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
# Made after the replication, whose validation images picked the method; with seeds that nothing else was run with.
# Its intervals are corrected for the claims of both rounds: a second round makes no claim cheaper.
SECOND = (
    Claim("digits", 0.2, "adaptive-cold-clean-label", "pgd-at", "test_autoattack", range(10, 20)),
    Claim("mnist5k", 0.3, "adaptive-cold-clean-label", "pgd-at", "test_apgd", range(10, 20)),
)
CLAIMS = (*FIRST, *SECOND)


def claimed(runs: Iterable[Run]) -> list[Run]:
    """The runs by which a claim is judged: those whose test images are read."""
    return [run for run in runs if any(claim.about(run) for claim in CLAIMS)]


def measures(dataset: str, claims: Sequence[Claim]) -> list[str]:
    """What the claims about a data set are of, each once."""
    return list(dict.fromkeys(claim.measure for claim in claims if claim.dataset == dataset))
