"""The cells of the study's tables: accuracies in %, mean ± standard deviation over seeds, and differences in points."""

from collections.abc import Iterable
from math import isnan
from statistics import fmean

import pandas as pd

from benchmarks.study.grid import SETTINGS
from benchmarks.study.paired import LEVEL, Interval

CHANCE = 0.2  # natural accuracy below which a run has collapsed: ten classes, guessed, give 0.1
NAMES = {
    "natural": "natural", "pgd20": "PGD-20", "cw30": "CW-30", "apgd": "APGD", "transfer": "transfer",
    "autoattack": "AutoAttack",
}  # fmt: skip


def percent(shares: pd.Series) -> str:
    """Mean ± sd of shares in [0, 1], in %; with their number, where some are missing."""
    known = shares.dropna()
    if known.empty:
        return "-"
    spread = f" ± {100 * known.std():.1f}" if len(known) > 1 else ""
    text = f"{100 * fmean(known):.1f}{spread}"
    return text if len(known) == len(shares) else f"{text} (n = {len(known)})"


def signed(value: float) -> str:
    """One decimal, always with its sign; no zero with a minus. A mean of nothing is NaN, and a dash here."""
    text = f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "-" if isnan(value) else "0.0" if text[1:] == "0.0" else text


def difference(found: Interval) -> str:
    """The mean and its interval, where there is one; bold where that leaves out 0."""
    if isnan(found.low):
        return signed(found.mean)
    text = f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def level(comparisons: int) -> str:
    """What the intervals of a table hold at, in a line below it; "" where it has none."""
    of = "the interval" if comparisons == 1 else f"all {comparisons} intervals together, by Bonferroni's correction"
    return f"\n{100 * LEVEL:g} % for {of}.\n" if comparisons else ""


def named(text: str, runs: pd.DataFrame) -> str:
    """The text, and how many of the runs ended in the constant prediction: a mean over some that did says little."""
    collapsed = (runs["natural"] < CHANCE).sum()
    some = "" if collapsed == len(runs) else f"{collapsed} of {len(runs)} "
    return f"{text} ({some}collapsed)" if collapsed else text


def radius(eps: float) -> str:
    """As people write it: 0.2, but 8/255."""
    whole = round(255 * eps)
    return f"{whole}/255" if eps < 0.1 and f"{whole / 255:.6g}" == f"{eps:.6g}" else f"{eps:g}"


def place(dataset: str, eps: float | None = None) -> str:
    """A data set and a radius, its first one unless another is named."""
    return f"{dataset}, eps {radius(SETTINGS[dataset].eps[0] if eps is None else eps)}"


def measured(name: str, runs: pd.DataFrame) -> str:
    """What is measured and on which images: AutoAttack is on the first so many."""
    images = "test" if name.startswith("test_") else "validation"
    counts = [f"{count:g}" for count in sorted({*runs["test_autoattack_images"].dropna()})]
    first = f"first {' or '.join(counts)} " if counts and name == "test_autoattack" else ""
    return f"{NAMES[name.removeprefix('test_')]}, {first}{images}"


def counts(runs: Iterable[pd.DataFrame]) -> str:
    """How many runs each cell is of; one number where all are alike."""
    numbers = [str(len(of)) for of in runs]
    return numbers[0] if len({*numbers}) == 1 else " / ".join(numbers)
