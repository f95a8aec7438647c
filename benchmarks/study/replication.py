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
    apgd = found.set_index(["method", "clean_label", "clean_guidance", "seed"])["apgd"].unstack()
    lines = []
    ordered = found.assign(method=pd.Categorical(found["method"], METHODS))
    for key, runs in ordered.groupby(["method", "clean_label", "clean_guidance"], observed=True):
        method, label, guidance = key
        added = f"{label:g} CE(S(x), y)" if label else f"clean guidance {guidance:g}" if guidance else "-"
        gaps = [
            100 * (apgd.loc[key] - apgd.loc[plain]).dropna() if plain in apgd.index and plain != key else pd.Series()
            for plain in (("pgd-at", 0, 0), (method, 0, 0))
        ]
        cells = [difference(interval(gap)) if len(gap) else "-" for gap in gaps]
        dead = int((runs["natural"] < DEAD).sum())
        lines.append([method, added, percent(runs["natural"]), percent(runs["apgd"]), *cells, dead or "-", len(runs)])
    head = ["method", "with", "natural", "APGD", "APGD − pgd-at", "APGD − without", "natural below 50 %", "seeds"]
    return markdown.table(head, lines) + EACH if lines else ""


def together(replication: pd.DataFrame, runs: pd.DataFrame) -> str:
    """What clean guidance of weight 1 adds to `adaptive` on digits: in the study, in the replication, in both."""
    adaptive = replication[(replication["method"] == "adaptive") & (replication["clean_label"] == 0)]
    names = {0: "adaptive", 1: "adaptive-clean-guidance"}
    again = adaptive.assign(method=adaptive["clean_guidance"].map(names)).dropna(subset=["method"])
    parts = {
        name: paired_differences(table, "adaptive-clean-guidance", "adaptive", "apgd")
        for name, table in (("the study", runs), ("the replication", again))
    }
    if any(part.empty for part in parts.values()):
        return ""
    parts["both"] = pd.concat(parts.values())
    lines = [[name, difference(interval(values)), len(values)] for name, values in parts.items()]
    return markdown.table(["runs of", "APGD, adaptive-clean-guidance − adaptive", "pairs"], lines) + EACH
