"""What the study claims of the test images, written down before any of them is read.

Settings and recipes are chosen on the validation images. A claim that is made afterwards, with the test numbers on the
table, is chosen by them too, and they no longer test it. So the claims come first, all of them count in the correction
for how many there are, and one that fails stays.
"""

from dataclasses import dataclass

# The accuracies among a Record's fields, of which more is better.
MEASURES = (
    "natural",
    "pgd20",
    "cw30",
    "apgd",
    "transfer",
    "test_natural",
    "test_pgd20",
    "test_apgd",
    "test_autoattack",
)


@dataclass(frozen=True)
class Claim:
    """One method has a higher accuracy than another.

    Args:
        dataset, eps: where; with the data set's own network.
        better, worse: methods, of lab.runs.METHODS.
        measure: the accuracy, one of MEASURES.
    """

    dataset: str
    eps: float
    better: str
    worse: str
    measure: str

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}; got {self.measure!r}")


# On digits, of AutoAttack. On mnist5k the differences are smaller, and AutoAttack takes too long for more than a few
# images of a run: there, of APGD on all of them.
CLAIMS = (
    Claim("digits", 0.2, "adaptive", "literal", "test_autoattack"),
    Claim("digits", 0.2, "adaptive", "trades", "test_autoattack"),
    Claim("digits", 0.2, "adaptive", "pgd-at", "test_autoattack"),
    Claim("digits", 0.2, "adaptive-cold", "pgd-at", "test_autoattack"),
    Claim("digits", 0.2, "pgd-at-weighted-cold", "pgd-at", "test_autoattack"),
    Claim("mnist5k", 0.3, "adaptive-cold", "trades", "test_apgd"),
    Claim("mnist5k", 0.3, "adaptive-cold", "pgd-at", "test_apgd"),
    Claim("mnist5k", 0.3, "pgd-at-weighted-cold", "pgd-at", "test_apgd"),
)
