"""The replication's tables: runs with another split and other seeds, with terms added to the methods of the study."""

from collections.abc import Iterator

import pandas as pd

from benchmarks.study.cells import difference, markdown, percent
from benchmarks.study.grid import SETTINGS
from benchmarks.study.paired import interval, paired_differences
from benchmarks.study.records import select

METHODS = (
    "pgd-at", "pgd-at-weighted-cold", "adaptive", "adaptive-cold", "literal", "literal-tau2", "detach", "detach-tau2",
)  # fmt: skip
EACH = "\n95 % for each interval by itself.\n"
DEAD = 0.5  # natural accuracy below which a run learned next to nothing: few of the dead ones predict one class alone


def replication_tables(replication: pd.DataFrame, runs: pd.DataFrame) -> dict[str, str]:
    """The blocks of docs/study.md: a table a data set, and clean guidance with the study's own runs too."""
    blocks = {f"replication-{name}": table(select(replication, name)) for name in SETTINGS if name != "cifar10"}
    return blocks | {"replication-together": together(replication, runs)}


def table(found: pd.DataFrame) -> str:
    """A line a method and what was added to it; the differences are of APGD accuracy, seed by seed.

    One from PGD-AT, one from the method with nothing added. The intervals are not corrected for each other.
    """
    named = found.assign(method=[_label(row.method, row.clean_guidance, row.clean_label) for row in found.itertuples()])
    lines = []
    for method, added, label in _variants(found):
        of = named[named["method"] == label]
        pairs = [paired_differences(named, label, base, "apgd") if label != base else [] for base in ("pgd-at", method)]
        differences = [difference(interval(values)) if len(values) else "-" for values in pairs]
        dead = int((of["natural"] < DEAD).sum())
        lines.append([method, added, percent(of["natural"]), percent(of["apgd"]), *differences, dead or "-", len(of)])
    head = ["method", "with", "natural", "APGD", "APGD − pgd-at", "APGD − without", "natural below 50 %", "seeds"]
    return markdown(head, lines) + EACH if lines else ""


def together(replication: pd.DataFrame, runs: pd.DataFrame) -> str:
    """What clean guidance of weight 1 adds to `adaptive` on digits: in the study, in the replication, in both."""
    adaptive = replication[(replication["method"] == "adaptive") & (replication["clean_label"] == 0)]
    names = {0: "adaptive", 1: "adaptive-clean-guidance"}
    again = adaptive.assign(method=adaptive["clean_guidance"].map(names)).dropna(subset=["method"])
    parts = {
        name: paired_differences(select(table, "digits"), "adaptive-clean-guidance", "adaptive", "apgd")
        for name, table in (("the study", runs), ("the replication", again))
    }
    if any(part.empty for part in parts.values()):
        return ""
    parts["both"] = pd.concat(parts.values())
    lines = [[name, difference(interval(values)), len(values)] for name, values in parts.items()]
    return markdown(["runs of", "APGD, adaptive-clean-guidance − adaptive", "pairs"], lines) + EACH


def _variants(found: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Every method with all that was added to it: the method, the addition in words, both as one label."""
    keys = found[["method", "clean_guidance", "clean_label"]].drop_duplicates()
    keys = keys.sort_values(["clean_label", "clean_guidance"])
    for method in METHODS:
        for row in keys[keys["method"] == method].itertuples():
            guidance = f"clean guidance {row.clean_guidance:g}" if row.clean_guidance else ""
            label = f"{row.clean_label:g} CE(S(x), y)" if row.clean_label else ""
            yield method, guidance or label or "-", _label(method, row.clean_guidance, row.clean_label)


def _label(method: str, clean_guidance: float, clean_label: float) -> str:
    return method if not (clean_guidance or clean_label) else f"{method} {clean_guidance} {clean_label}"
