"""The study's tables in Markdown, so that no number in the documentation is typed. A table of nothing is ""."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pandas as pd

from benchmarks import markdown
from benchmarks.study import grid
from benchmarks.study.cells import NAMES, counts, difference, level, measured, named, percent, place, radius, signed
from benchmarks.study.claims import MEASURES, Claim, measures
from benchmarks.study.paired import interval, paired_differences
from benchmarks.study.records import by_method, select

SHOWN = (*grid.MAIN, *grid.CONTROLS)  # by the main tables, in this order
Column = tuple[str, Callable[[str, pd.DataFrame], object]]  # a head, and the cell of a method and its runs

ABOUT: Column = ("what it is", lambda method, _: grid.METHODS[method].about)
SEEDS: Column = ("seeds", lambda _, runs: len(runs))


def accuracy(measure: str, head: str | None = None) -> Column:
    """Mean and spread of a measure."""
    return head or NAMES[measure], lambda _, runs: percent(runs[measure])


ACCURACIES = (accuracy("natural"), accuracy("pgd20"), accuracy("apgd"))


def gap(measure: str) -> Column:
    """How far a measure stays above APGD, run by run: a sign of gradient masking."""
    return f"{NAMES[measure]} − APGD", lambda _, runs: signed(100 * (runs[measure] - runs["apgd"]).mean())


def listing(groups: Mapping[str, pd.DataFrame], columns: Sequence[Column], head: str = "method") -> str:
    """A line a method, which says how many of its runs collapsed."""
    lines = [[named(name, runs), *(cell(name, runs) for _, cell in columns)] for name, runs in groups.items()]
    return markdown.table([head, *(name for name, _ in columns)], lines)


def methods_table(records: pd.DataFrame) -> str:
    """A line a method: what it is, its options of the training command, and what the study changes beside.

    Without the points of the sweeps and of the search: their tables say what they are.
    """
    elsewhere = {*grid.TAU_SWEEP, *grid.BETA_SWEEP, *grid.SEARCH} - {*SHOWN, *grid.ABLATION}
    lines = []
    for name in by_method(records, (name for name in grid.METHODS if name not in elsewhere)):
        method = grid.METHODS[name]
        changes = [f"`{field} = {value!r}`" for field, value in method.change.items()]
        lines.append([name, method.about, ", ".join([f"`{method.options}`", *changes])])
    return markdown.table(["method", "what it is", "options"], lines)


def main_table(
    records: pd.DataFrame, dataset: str, eps: float, arch: str | None = None, more: Sequence[str] = ()
) -> str:
    """A line a method, of SHOWN and more: accuracies on the validation images, then signs of gradient masking."""
    zero: Column = ("zero gradients, %", lambda _, runs: f"{100 * runs['zero_gradients'].mean():.1f}")
    groups = by_method(select(records, dataset, eps, arch), (*SHOWN, *more))
    return listing(groups, [*ACCURACIES, gap("pgd20"), gap("cw30"), gap("transfer"), zero, SEEDS])


def difference_table(records: pd.DataFrame, dataset: str, eps: float, against: str = "pgd-at") -> str:
    """A line a method but the clean teacher: what it has above `against`."""
    groups = by_method(select(records, dataset, eps), SHOWN)
    baseline = groups.pop(against, records[:0])
    groups.pop("clean", None)
    return compared(groups, dict.fromkeys(groups, baseline), less=f" − {against}")


def agreement_table(here: pd.DataFrame, there: pd.DataFrame, dataset: str, eps: float, arch: str | None = None) -> str:
    """Whether runs give the numbers of the same runs of version 0.1.0.

    Another processor, another release of torch or of the training loop rounds differently, and training makes another
    network of that: the differences should be chance, and none bold.
    """
    ours, theirs = (by_method(select(records, dataset, eps, arch), SHOWN) for records in (here, there))
    return compared(ours, theirs, head="less 0.1.0")


def compared(
    groups: Mapping[str, pd.DataFrame], others: Mapping[str, pd.DataFrame], head: str = "method", less: str = ""
) -> str:
    """A line a method that has pairs with its others: the differences of natural and APGD accuracy, seed by seed.

    The intervals are corrected for how many the table shows. Bold: leaves out 0.
    """
    both = ("natural", "apgd")
    pairs = {
        method: [paired_differences(runs, others.get(method, runs[:0]), measure, ["epochs"]) for measure in both]
        for method, runs in groups.items()
    }
    shown = sum(len(found) > 1 for of in pairs.values() for found in of)
    lines = [
        [named(method, groups[method]), *(difference(interval(found, max(1, shown))) for found in of), len(of[-1])]
        for method, of in pairs.items()
        if len(of[-1])
    ]
    return markdown.table([head, *(NAMES[measure] + less for measure in both), "pairs"], lines) + level(shown)


def search_table(records: pd.DataFrame, dataset: str) -> str:
    """A line a change that the search for a recipe tried, at the data set's first radius, and what came of it.

    The differences are from the method that was changed, seed by seed; without intervals, for which a search has too
    few seeds: it chooses what to look at, and shows nothing.
    """
    groups = by_method(select(records, dataset), grid.METHODS)

    def change(method: str, runs: pd.DataFrame, measure: str) -> str:
        return signed(paired_differences(runs, groups.get(grid.base_of(method), runs[:0]), measure).mean())

    changes: list[Column] = [(NAMES[measure], partial(change, measure=measure)) for measure in ("natural", "apgd")]
    less: Column = ("less", lambda method, _: grid.base_of(method))
    columns = [ABOUT, accuracy("natural"), accuracy("apgd"), less, *changes, gap("pgd20"), SEEDS]
    return listing({name: runs for name, runs in groups.items() if name in grid.SEARCH}, columns)


def paper_table(records: pd.DataFrame, labels: Mapping[str, object], head: str, *more: Column) -> str:
    """The paper's Tables 3a, 3b and 3c on digits: a line a method under its label, once there are two of them."""
    groups = by_method(select(records, "digits"), labels)
    lines = {str(label): groups.get(method, records[:0]) for method, label in labels.items()}
    return listing(lines if len(groups) > 1 else {}, [*more, *ACCURACIES, SEEDS], head)


def capacity_table(records: pd.DataFrame, dataset: str, eps: float) -> str:
    """The paper's Table 1: natural / APGD, a line a method that was run at two widths or more, a column a width."""
    lines = []
    for method, runs in by_method(records, (*grid.CAPACITY, *grid.LARGER)).items():
        found = [select(runs, dataset, eps, arch) for arch in grid.WIDTHS]
        if sum(len(of) > 0 for of in found) > 1:
            both = [named(f"{percent(of['natural'])} / {percent(of['apgd'])}", of) if len(of) else "-" for of in found]
            lines.append([method, *both, counts(found)])
    widths = [f"width {arch.partition('-')[2] or 16}: natural / APGD" for arch in grid.WIDTHS]
    return markdown.table(["method", *widths, "seeds"], lines)


def test_table(records: pd.DataFrame, dataset: str, eps: float) -> str:
    """A line a method whose test images were read."""
    found = select(records, dataset, eps).dropna(subset=["test_natural"])
    groups = by_method(found, (*SHOWN, *found["method"]))  # a claim can be about any method
    return listing(groups, [*(accuracy(name, measured(name, found)) for name in MEASURES), SEEDS])


def claims_table(records: pd.DataFrame, claims: Sequence[Claim], comparisons: int) -> str:
    """A line a claim, once one of them can be judged.

    A claim holds where the whole interval is above 0, and is refuted where all of it is below.

    Args:
        comparisons: claims that the intervals are corrected for, earlier rounds included.
    """
    lines, judged = [], False
    for claim in claims:
        found = select(records, claim.dataset, claim.eps)
        found = found[found["seed"].isin(claim.seeds) & found["method"].isin([claim.better, claim.worse])]
        better, worse = (found[found["method"] == method] for method in (claim.better, claim.worse))
        differences = paired_differences(better, worse, claim.measure)
        cells = ["-", "-", f"{len(differences)} of {len(claim.seeds)}"]
        if len(differences) == len(claim.seeds):
            judged, result = True, interval(differences, comparisons)
            verdict = "yes" if result.low > 0 else "no" if result.high < 0 else "not shown"
            cells = [difference(result), verdict, str(len(differences))]
        where, what = place(claim.dataset, claim.eps), f"{claim.better} > {claim.worse}"
        lines.append([where, what, measured(claim.measure, found), *cells])
    head = ["where", "claim", "of", "difference", "holds", "pairs"]
    return markdown.table(head, lines) + level(comparisons) if judged else ""


def compact_table(records: pd.DataFrame, claims: Sequence[Claim]) -> str:
    """For the README: the main methods and those that a claim is about, at each data set's first radius.

    Natural accuracy and APGD on the validation images, and what the claims are of on the test images.
    """
    found = {dataset: runs for dataset in grid.SETTINGS if len(runs := select(records, dataset))}
    columns = [
        (dataset, name)
        for dataset, runs in found.items()
        for name in ("natural", "apgd", *measures(dataset, claims))
        if runs[name].notna().any()
    ]

    def cell(runs: pd.DataFrame, name: str) -> str:
        return named(percent(runs[name]), runs) if name == "natural" else percent(runs[name])

    lines = []
    for method in dict.fromkeys([*grid.MAIN, *(name for claim in claims for name in (claim.better, claim.worse))]):
        own = {dataset: runs[runs["method"] == method] for dataset, runs in found.items()}
        if any(map(len, own.values())):
            lines.append([method, *(cell(own[dataset], name) for dataset, name in columns), counts(own.values())])
    head = [f"{place(dataset)}, {measured(name, found[dataset])}" for dataset, name in columns]
    return markdown.table(["accuracy in %", *head, "seeds"], lines)


def provenance(records: pd.DataFrame) -> str:
    """Epochs, split, device, versions and dates of the runs, in a line; every value that occurs."""
    columns = ("epochs", "split_seed", "device", "torch", "python", "cktat_loss")
    every = {name: ", ".join(map(str, sorted(records[name].unique()))) for name in columns}
    dates = " to ".join(sorted({records["date"].min(), records["date"].max()}))
    return (
        "{epochs} epochs, split seed {split_seed}; {device}, torch {torch}, Python {python}, cktat-loss {cktat_loss}, "
        "{dates}.\n"
    ).format(**every, dates=dates)


def captioned(
    table: Callable[[pd.DataFrame, str, float], str], records: pd.DataFrame, dataset: str | None = None
) -> str:
    """A table of each radius of a data set, or of all data sets, under its caption; without those that are empty."""
    found = {
        f"eps {radius(eps)}" if dataset else place(name, eps): table(records, name, eps)
        for name in ([dataset] if dataset else grid.SETTINGS)
        for eps in grid.SETTINGS[name].eps
    }
    return "\n".join(f"{caption}:\n\n{text}" for caption, text in found.items() if text)
