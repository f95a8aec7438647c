"""What the study claims of the test images, written down before any of them is read.

Settings and recipes are chosen on the validation images. A claim that is made afterwards, with the test numbers on the
table, is chosen by them too, and they no longer test it. So the claims come first, all of them count in the correction
for how many there are, and one that fails stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lab.runs import METHODS, SETTINGS

MEASURES = ("test_natural", "test_pgd20", "test_apgd", "test_autoattack")  # fields of a Record


@dataclass(frozen=True)
class Claim:
    """One method has a higher accuracy than another.

    Args:
        dataset, eps: where; with the data set's own network.
        better, worse: methods, of lab.runs.METHODS.
        measure: the accuracy, one of MEASURES.
        seeds: of how many pairs it is judged, not before and, so that nobody stops where it looks good, not after.
    """

    dataset: str
    eps: float
    better: str
    worse: str
    measure: str
    seeds: int

    def __post_init__(self) -> None:
        known = {"dataset": SETTINGS, "better": METHODS, "worse": METHODS, "measure": MEASURES}
        for name, names in known.items():
            if (value := getattr(self, name)) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}; got {value!r}")


# On digits, of AutoAttack. On mnist5k the differences are smaller, and AutoAttack takes too long for more than a few
# images of a run: there, of APGD on all of them.
CLAIMS = (
    Claim("digits", 0.2, "adaptive", "literal", "test_autoattack", 5),
    Claim("digits", 0.2, "adaptive", "trades", "test_autoattack", 8),
    Claim("digits", 0.2, "adaptive", "pgd-at", "test_autoattack", 8),
    Claim("digits", 0.2, "adaptive-cold", "pgd-at", "test_autoattack", 8),
    Claim("digits", 0.2, "pgd-at-weighted-cold", "pgd-at", "test_autoattack", 8),
    Claim("mnist5k", 0.3, "adaptive-cold", "trades", "test_apgd", 5),
    Claim("mnist5k", 0.3, "adaptive-cold", "pgd-at", "test_apgd", 10),
    Claim("mnist5k", 0.3, "pgd-at-weighted-cold", "pgd-at", "test_apgd", 10),
)


def measures(dataset: str, claims: Sequence[Claim]) -> list[str]:
    """What the claims about a data set are of, each once."""
    return list(dict.fromkeys(claim.measure for claim in claims if claim.dataset == dataset))
