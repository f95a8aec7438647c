"""The study's tables in Markdown, from its CSVs, so that no number in the documentation is typed.

A table without lines is "".
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pandas as pd

from benchmarks import markdown
from benchmarks.study import grid
from benchmarks.study.cells import (
    NAMES,
    by_method,
    counts,
    difference,
    interval,
    level,
    measured,
    named,
    paired,
    percent,
    place,
    select,
    signed,
)  # fmt: skip
from benchmarks.study.claims import CLAIMS, FIRST, SECOND, Claim
from benchmarks.study.grid import METHODS, SETTINGS, SHOWN

TESTS = ("test_natural", "test_pgd20", "test_apgd", "test_autoattack")
EACH = "\n95 % for each interval by itself.\n"
Groups = Mapping[str, pd.DataFrame]  # the runs of each line of a table
Column = tuple[str, Callable[[str, pd.DataFrame], object]]  # a head, and the cell of a line from its name and runs


def listing(groups: Groups, columns: Sequence[Column], head: str = "method") -> str:
    """Return a table with one line per group."""
    lines = [[named(name, runs), *(cell(name, runs) for _, cell in columns)] for name, runs in groups.items()]
    return markdown.table([head, *(name for name, _ in columns)], lines)


def accuracy(measure: str, head: str = "") -> Column:
    """Return a column of means and standard deviations."""
    return head or NAMES[measure], lambda _, runs: percent(runs[measure])


def gap(measure: str) -> Column:
    """Return a column of mean differences from APGD, a sign of gradient masking."""
    return f"{NAMES[measure]} − APGD", lambda _, runs: signed(100 * (runs[measure] - runs["apgd"]).mean())


ABOUT: Column = ("what it is", lambda method, _: METHODS[method].about)
SEEDS: Column = ("seeds", lambda _, runs: len(runs))
ZERO: Column = ("zero gradients, %", lambda _, runs: f"{100 * runs['zero_gradients'].mean():.1f}")
ACCURACIES = accuracy("natural"), accuracy("pgd20"), accuracy("apgd")


def methods_table(runs: pd.DataFrame) -> str:
    """Return the settings of the methods. The tables of the sweeps and of the search explain theirs."""
    shown = [name for name in by_method(runs, METHODS) if METHODS[name].group in ("main", "control", "part", "other")]
    lines = [[name, METHODS[name].about, f"`{METHODS[name].settings}`"] for name in (*shown, "ramp-beta0")]
    return markdown.table(["method", "what it is", "settings"], lines).replace("``", "the defaults")


def page_table(runs: pd.DataFrame, dataset: str) -> str:
    """Return the table of docs/study.md: each method's accuracies, and its lead over PGD-AT in APGD.

    The leads are those of `difference_table`, and corrected as there.
    """
    groups = by_method(select(runs, dataset), SHOWN)
    pairs = {
        name: [paired(own, groups["pgd-at"], measure, "epochs") for measure in ("natural", "apgd")]
        for name, own in groups.items() if name not in ("clean", "pgd-at")
    }  # fmt: skip
    shown = sum(len(found) > 1 for both in pairs.values() for found in both)
    lead: Column = ("APGD − pgd-at", lambda name, _: difference(pairs[name][1], shown) if name in pairs else "-")
    return listing(groups, [ABOUT, accuracy("natural"), accuracy("apgd"), lead, SEEDS]) + level(shown)


def main_table(runs: pd.DataFrame, dataset: str, eps: float, more: Sequence[str] = ()) -> str:
    """Return accuracies on validation images, then signs of gradient masking, of SHOWN and `more`."""
    columns = *ACCURACIES, gap("pgd20"), gap("cw30"), gap("transfer"), ZERO, SEEDS
    return listing(by_method(select(runs, dataset, eps), (*SHOWN, *more)), columns)


def difference_table(runs: pd.DataFrame, dataset: str, eps: float, against: str = "pgd-at") -> str:
    """Return the differences of every method from one of them."""
    groups = by_method(select(runs, dataset, eps), SHOWN)
    groups.pop("clean", None)
    baseline = groups.pop(against, runs[:0])
    return compared(groups, dict.fromkeys(groups, baseline), less=f" − {against}")


def agreement_table(here: pd.DataFrame, there: pd.DataFrame, dataset: str, eps: float) -> str:
    """Return the differences of runs from the same runs of version 0.1.0. They should be chance, none bold."""
    ours, theirs = (by_method(select(runs, dataset, eps), SHOWN) for runs in (here, there))
    return compared(ours, theirs, head="less 0.1.0")


def compared(groups: Groups, others: Groups, head: str = "method", less: str = "") -> str:
    """Return the differences of natural and APGD accuracy between groups of the same name."""
    pairs = {
        name: [paired(runs, others.get(name, runs[:0]), measure, "epochs") for measure in ("natural", "apgd")]
        for name, runs in groups.items()
    }
    shown = sum(len(found) > 1 for both in pairs.values() for found in both)
    lines = [
        [named(name, groups[name]), *(difference(found, max(1, shown)) for found in both), len(both[1])]
        for name, both in pairs.items() if len(both[1])
    ]  # fmt: skip
    return markdown.table([head, f"natural{less}", f"APGD{less}", "pairs"], lines) + level(shown)


def search_table(runs: pd.DataFrame, dataset: str) -> str:
    """Return the search for a better recipe: each method less the one that it changes.

    There are no intervals, because a search has too few seeds for them.
    """
    groups = by_method(select(runs, dataset), METHODS)

    def changed(method: str) -> str:
        return max((name for name in SHOWN if method.startswith(name)), key=len)

    def change(method: str, runs: pd.DataFrame, measure: str) -> str:
        return signed(paired(runs, groups.get(changed(method), runs[:0]), measure).mean())

    changes: list[Column] = [(NAMES[measure], partial(change, measure=measure)) for measure in ("natural", "apgd")]
    less: Column = ("less", lambda method, _: changed(method))
    columns = [ABOUT, ACCURACIES[0], ACCURACIES[2], less, *changes, gap("pgd20"), SEEDS]
    return listing({name: group for name, group in groups.items() if name in grid.SEARCH}, columns)


def paper_table(runs: pd.DataFrame, labels: Mapping[str, object], head: str, *more: Column) -> str:
    """Return one of the paper's Tables 3a, 3b and 3c, on digits.

    Args:
        labels: the text of each method's line.
    """
    groups = by_method(select(runs, "digits"), labels)
    return listing({str(labels[name]): group for name, group in groups.items()}, [*more, *ACCURACIES, SEEDS], head)


def capacity_table(runs: pd.DataFrame, dataset: str, eps: float) -> str:
    """Return the paper's Table 1: natural / APGD, one column per width, of methods with two widths or more."""
    lines = []
    for method, group in by_method(runs, (*grid.CAPACITY, *grid.LARGER)).items():
        found = [select(group, dataset, eps, arch) for arch in grid.WIDTHS]
        if sum(len(own) > 0 for own in found) > 1:
            both = [
                named(f"{percent(own['natural'])} / {percent(own['apgd'])}", own) if len(own) else "-" for own in found
            ]
            lines.append([method, *both, counts(found)])
    widths = [f"width {arch.partition('-')[2] or 16}: natural / APGD" for arch in grid.WIDTHS]
    return markdown.table(["method", *widths, "seeds"], lines)


def test_table(runs: pd.DataFrame, dataset: str, eps: float) -> str:
    """Return the accuracies on test images of the methods that were read."""
    found = select(runs, dataset, eps).dropna(subset=["test_natural"])
    columns = [accuracy(name, measured(name, found)) for name in TESTS]
    return listing(by_method(found, (*SHOWN, *found["method"])), [*columns, SEEDS])


def claims_table(runs: pd.DataFrame, claims: Sequence[Claim], comparisons: int) -> str:
    """Return the claims and their outcome.

    A claim holds if its whole interval is above 0, and is refuted if all of it is below. It is judged once all of its
    seeds are there, and by no others.

    Args:
        comparisons: number of claims that the intervals are corrected for, earlier rounds included.
    """
    lines = []
    for claim in claims:
        found = select(runs, claim.dataset, claim.eps)
        found = found[found["seed"].isin(claim.seeds) & found["method"].isin([claim.better, claim.worse])]
        sides = (found[found["method"] == method] for method in (claim.better, claim.worse))
        pairs = paired(*sides, claim.measure)
        cells: list[object] = ["-", "-", f"{len(pairs)} of {len(claim.seeds)}"]
        if len(pairs) == len(claim.seeds):
            _, low, high = interval(pairs, comparisons)
            cells = [
                difference(pairs, comparisons),
                "yes" if low > 0 else "no" if high < 0 else "not shown",
                len(pairs),
            ]
        where = place(claim.dataset, claim.eps), f"{claim.better} > {claim.worse}", measured(claim.measure, found)
        lines.append([*where, *cells])
    return markdown.table(["where", "claim", "of", "difference", "holds", "pairs"], lines) + level(comparisons)


def readme_table(runs: pd.DataFrame) -> str:
    """Return the README's table: natural and robust accuracy on test images, with the number of seeds in the cell."""
    found = {dataset: select(runs, dataset).dropna(subset=["test_natural"]) for dataset in SETTINGS}
    robust = {claim.dataset: claim.measure for claim in FIRST}
    columns = [(dataset, measure) for dataset in SETTINGS for measure in ("test_natural", robust[dataset])]

    def cell(own: pd.DataFrame, measure: str) -> str:
        return f"{percent(own[measure])} (n = {len(own)})" if len(own) else "-"

    rows = by_method(pd.concat(found.values()), SHOWN)
    lines = [
        [named(method, own), *(cell(own[own["dataset"] == dataset], measure) for dataset, measure in columns)]
        for method, own in rows.items()
    ]
    heads = [f"{place(dataset)}: {measured(measure, found[dataset])}" for dataset, measure in columns]
    return markdown.table(["method", *heads], lines)


# The replication's methods, in the order of its table.
REPLICATED = (
    "pgd-at", "pgd-at-weighted-cold", "adaptive", "adaptive-cold", "literal", "literal-tau2", "detach", "detach-tau2",
)  # fmt: skip
DEAD = 0.5  # natural accuracy below which a run of the replication counts as dead


def replication_table(runs: pd.DataFrame) -> str:
    """Return the replication: runs with another split and other seeds, and with terms added to the methods."""
    ordered = runs.assign(method=pd.Categorical(runs["method"], REPLICATED))
    groups, lines = dict(iter(ordered.groupby(["method", "clean_label", "clean_guidance"], observed=True))), []
    for (method, label, guidance), group in groups.items():
        added = f"{label:g} CE(S(x), y)" if label else f"clean guidance {guidance:g}" if guidance else "-"
        others = [groups.get((name, 0, 0), group[:0]) for name in ("pgd-at", method)]
        gaps = ["-" if other is group else difference(paired(group, other, "apgd")) for other in others]
        dead = (group["natural"] < DEAD).sum() or "-"
        lines.append([method, added, percent(group["natural"]), percent(group["apgd"]), *gaps, dead, len(group)])
    head = ["method", "with", "natural", "APGD", "APGD − pgd-at", "APGD − without", "natural below 50 %", "seeds"]
    return markdown.table(head, lines) + EACH


def together_table(replication: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Return what clean guidance adds to `adaptive` on digits, in the study and in the replication."""
    names = {0: "adaptive", 1: "adaptive-clean-guidance"}
    again = replication[(replication["method"] == "adaptive") & (replication["clean_label"] == 0)]
    again = again.assign(method=again["clean_guidance"].map(names))
    parts = {
        where: paired(*(found[found["method"] == names[guided]] for guided in (1, 0)), "apgd")
        for where, found in (("the study", runs), ("the replication", again))
    }
    parts["both"] = pd.concat(parts.values())
    lines = [[name, difference(values), len(values)] for name, values in parts.items()]
    return markdown.table(["runs of", "APGD, adaptive-clean-guidance − adaptive", "pairs"], lines) + EACH


def provenance(runs: pd.DataFrame) -> str:
    """Return a line with every value of epochs, split, device, versions and dates that occurs."""
    epochs, split, device, torch, python, version = (
        ", ".join(map(str, sorted(runs[name].unique())))
        for name in ("epochs", "split_seed", "device", "torch", "python", "cktat_loss")
    )
    dates = " to ".join(sorted({runs["date"].min(), runs["date"].max()}))
    return (
        f"\n{grid.VALIDATION} validation images; {epochs} epochs, split seed {split}; {device}, torch {torch}, "
        f"Python {python}, cktat-loss {version}, {dates}.\n"
    )


def captioned(table: Callable[[pd.DataFrame, str, float], str], runs: pd.DataFrame, dataset: str | None = None) -> str:
    """Return the tables of all radii under captions, without the empty ones. `dataset` None: of all data sets."""
    places = [(name, eps) for name in ([dataset] if dataset else SETTINGS) for eps in SETTINGS[name].eps]
    found = {(f"eps {eps:g}" if dataset else place(name, eps)): table(runs, name, eps) for name, eps in places}
    return "\n".join(f"{caption}:\n\n{text}" for caption, text in found.items() if text)


def blocks(runs: pd.DataFrame, second: pd.DataFrame, third: pd.DataFrame, replication: pd.DataFrame) -> dict[str, str]:
    """Return all tables by the name of their block.

    Args:
        runs: the study, by version 0.1.0.
        second: the second round of claims and a repetition, by version 0.2.
        third: a repetition by the training loop of version 0.3.
    """
    text = {
        "methods": methods_table(runs),
        "ablation": paper_table(runs, {name: name for name in grid.ABLATION}, "method", ABOUT),
        "tau": paper_table(runs, grid.TAU_SWEEP, "tau"),
        "beta": paper_table(runs, grid.BETA_SWEEP, "beta"),
        "capacity": captioned(capacity_table, runs),
        "test": captioned(test_table, runs),
        "claims": claims_table(runs, FIRST, len(FIRST)),
        "test-again": captioned(test_table, second),
        "claims-again": claims_table(second, SECOND, len(CLAIMS)),
        "agreement": captioned(partial(agreement_table, second), runs),
        "agreement-0.3": captioned(partial(agreement_table, third), runs),
        "replication-together": together_table(select(replication, "digits"), select(runs, "digits")),
        "study": readme_table(runs),
    }
    for name, setting in SETTINGS.items():
        own = runs[(runs["dataset"] == name) & (runs["arch"] == "digits")]
        text[f"page-{name}"] = page_table(runs, name)
        text[f"main-{name}"] = captioned(main_table, runs, name) + provenance(own)
        text[f"differences-{name}"] = captioned(difference_table, runs, name)
        text[f"controls-{name}"] = difference_table(runs, name, setting.eps[0], "adaptive")
        text[f"search-{name}"] = search_table(runs, name)
        text[f"replication-{name}"] = replication_table(select(replication, name))
    return text
