"""The replication's tables: runs with another split and other seeds, with terms added to the methods of the study."""

import pandas as pd

from benchmarks import markdown
from benchmarks.study.cells import difference, percent
from benchmarks.study.paired import interval, paired_differences
from benchmarks.study.records import select

METHODS = [
    "pgd-at", "pgd-at-weighted-cold", "adaptive", "adaptive-cold", "literal", "literal-tau2", "detach", "detach-tau2",
]  # fmt: skip
DEAD = 0.5  # natural accuracy below which a run learned next to nothing: few of those predict one class alone
EACH = "\n95 % for each interval by itself.\n"


def replication_tables(replication: pd.DataFrame, runs: pd.DataFrame) -> dict[str, str]:
    """The blocks of docs/study.md: a table a data set, and clean guidance with the study's own runs too."""
    blocks = {f"replication-{dataset}": table(select(replication, dataset)) for dataset in ("digits", "mnist5k")}
    return blocks | {"replication-together": together(select(replication, "digits"), select(runs, "digits"))}


def table(found: pd.DataFrame) -> str:
    """A line a method and what was added to it; the differences are of APGD accuracy, seed by seed.

    One from PGD-AT, one from the method with nothing added. The intervals are not corrected for each other.
    """
    ordered = found.assign(method=pd.Categorical(found["method"], METHODS))
    groups = dict(iter(ordered.groupby(["method", "clean_label", "clean_guidance"], observed=True)))
    lines = []
    for (method, label, guidance), runs in groups.items():
        added = f"{label:g} CE(S(x), y)" if label else f"clean guidance {guidance:g}" if guidance else "-"
        others = [groups.get((name, 0, 0), runs[:0]) for name in ("pgd-at", method)]
        gaps = [
            "-" if other is runs else difference(interval(paired_differences(runs, other, "apgd"))) for other in others
        ]
        dead = (runs["natural"] < DEAD).sum()
        lines.append([method, added, percent(runs["natural"]), percent(runs["apgd"]), *gaps, dead or "-", len(runs)])
    head = ["method", "with", "natural", "APGD", "APGD − pgd-at", "APGD − without", "natural below 50 %", "seeds"]
    return markdown.table(head, lines) + EACH if lines else ""


def together(replication: pd.DataFrame, runs: pd.DataFrame) -> str:
    """What clean guidance of weight 1 adds to `adaptive` on digits: in the study, in the replication, in both."""
    adaptive = replication[(replication["method"] == "adaptive") & (replication["clean_label"] == 0)]
    names = {0: "adaptive", 1: "adaptive-clean-guidance"}
    again = adaptive.assign(method=adaptive["clean_guidance"].map(names))
    parts = {}
    for name, found in (("the study", runs), ("the replication", again)):
        without, guided = (found[found["method"] == method] for method in names.values())
        parts[name] = paired_differences(guided, without, "apgd")
    if any(part.empty for part in parts.values()):
        return ""
    parts["both"] = pd.concat(parts.values())
    lines = [[name, difference(interval(values)), len(values)] for name, values in parts.items()]
    return markdown.table(["runs of", "APGD, adaptive-clean-guidance − adaptive", "pairs"], lines) + EACH
