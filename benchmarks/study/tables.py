"""The study's tables in Markdown, so that no number in the documentation is typed. A table of nothing is ""."""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from benchmarks import markdown
from benchmarks.study import grid
from benchmarks.study.cells import NAMES, counts, difference, level, mean_of, measured, named, percent, radius
from benchmarks.study.claims import MEASURES, Claim, measures
from benchmarks.study.paired import interval, paired_differences
from benchmarks.study.records import by_method, select

BASELINE = "pgd-at"
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
    return f"{NAMES[measure]} − APGD", lambda _, runs: mean_of(100 * (runs[measure] - runs["apgd"]))


def listing(
    groups: Mapping[str, pd.DataFrame],
    columns: Sequence[Column],
    head: str = "method",
    labels: Mapping[str, object] | None = None,
) -> str:
    """A line a method, by its name or a label, which says how many of its runs collapsed."""
    lines = [
        [named(str((labels or {}).get(method, method)), runs), *(cell(method, runs) for _, cell in columns)]
        for method, runs in groups.items()
    ]
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


def difference_table(records: pd.DataFrame, dataset: str, eps: float, against: str = BASELINE) -> str:
    """A line a method but the clean teacher: natural and APGD less those of `against`, seed by seed.

    The intervals are corrected for how many the table shows. Bold: leaves out 0.
    """
    found = select(records, dataset, eps)
    groups = by_method(found, (method for method in SHOWN if method not in ("clean", against)))
    pairs = {
        (method, measure): paired_differences(found, method, against, measure)
        for method in groups
        for measure in ("natural", "apgd")
    }
    shown = sum(len(differences) > 1 for differences in pairs.values())

    def column(measure: str) -> Column:
        head = f"{NAMES[measure]} − {against}"
        return head, lambda method, _: difference(interval(pairs[method, measure], max(1, shown)))

    groups = {method: runs for method, runs in groups.items() if len(pairs[method, "apgd"])}
    count: Column = ("pairs", lambda method, _: len(pairs[method, "apgd"]))
    return listing(groups, [column("natural"), column("apgd"), count]) + level(shown)


def search_table(records: pd.DataFrame, dataset: str) -> str:
    """A line a change that the search for a recipe tried, at the data set's first radius, and what came of it.

    The differences are from the method that was changed, seed by seed; without intervals, for which a search has too
    few seeds: it chooses what to look at, and shows nothing.
    """
    found = select(records, dataset)

    def change(measure: str) -> Column:
        return NAMES[measure], lambda method, _: mean_of(
            paired_differences(found, method, grid.base_of(method), measure)
        )

    less: Column = ("less", lambda method, _: grid.base_of(method))
    columns = [ABOUT, accuracy("natural"), accuracy("apgd"), less, change("natural"), change("apgd"), gap("pgd20")]
    return listing(by_method(found, grid.SEARCH), [*columns, SEEDS])


def paper_table(records: pd.DataFrame, labels: Mapping[str, object], head: str, *more: Column) -> str:
    """The paper's Tables 3a, 3b and 3c on digits: a line a method under its label, once there are two of them."""
    groups = by_method(select(records, "digits"), labels)
    groups = {method: groups.get(method, records[:0]) for method in labels} if len(groups) > 1 else {}
    return listing(groups, [*more, *ACCURACIES, SEEDS], head, labels)


def capacity_table(records: pd.DataFrame, dataset: str) -> str:
    """The paper's Table 1: natural / APGD, a line a method that was run at two widths or more, a column a width."""
    methods = dict.fromkeys((*grid.CAPACITY, *grid.LARGER))
    found = [by_method(select(records, dataset, arch=arch), methods) for arch in grid.WIDTHS]
    lines = []
    for method in methods:
        cells = [groups.get(method, records[:0]) for groups in found]
        if sum(len(runs) > 0 for runs in cells) > 1:
            both = [named(f"{percent(runs['natural'])} / {percent(runs['apgd'])}", runs) for runs in cells]
            lines.append([method, *("-" if text == "- / -" else text for text in both), counts(cells)])
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
    lines: list[list[object]] = []
    judged = False
    for claim in claims:
        found = select(records, claim.dataset, claim.eps)
        found = found[found["seed"].isin(claim.seeds) & found["method"].isin([claim.better, claim.worse])]
        differences = paired_differences(found, claim.better, claim.worse, claim.measure)
        where = f"{claim.dataset}, eps {radius(claim.eps)}"
        line = [where, f"{claim.better} > {claim.worse}", measured(claim.measure, found)]
        if len(differences) < len(claim.seeds):
            lines.append([*line, "-", "-", f"{len(differences)} of {len(claim.seeds)}"])
            continue
        judged, result = True, interval(differences, comparisons)
        verdict = "yes" if result.low > 0 else "no" if result.high < 0 else "not shown"
        lines.append([*line, difference(result), verdict, len(differences)])
    table = markdown.table(["where", "claim", "of", "difference", "holds", "pairs"], lines if judged else [])
    return table and table + level(comparisons)


def compact_table(records: pd.DataFrame, claims: Sequence[Claim]) -> str:
    """For the README: the main methods and those that a claim is about, at each data set's first radius.

    Natural accuracy and APGD on the validation images, and what the claims are of on the test images.
    """
    methods = [*grid.MAIN, *(name for claim in claims for name in (claim.better, claim.worse))]
    found = {dataset: runs for dataset in grid.SETTINGS if len(runs := select(records, dataset))}
    groups = {dataset: by_method(runs, methods) for dataset, runs in found.items()}
    columns = [
        (dataset, name)
        for dataset, runs in found.items()
        for name in ("natural", "apgd", *measures(dataset, claims))
        if runs[name].notna().any()
    ]
    lines = []
    for method in dict.fromkeys(methods):
        cells = {dataset: of.get(method, records[:0]) for dataset, of in groups.items()}
        if any(map(len, cells.values())):
            texts = [percent(cells[dataset][name]) for dataset, name in columns]
            for i, (dataset, name) in enumerate(columns):
                texts[i] = named(texts[i], cells[dataset]) if name == "natural" else texts[i]
            lines.append([method, *texts, counts(cells.values())])
    head = [
        f"{dataset}, eps {radius(grid.SETTINGS[dataset].eps[0])}, {measured(name, found[dataset])}"
        for dataset, name in columns
    ]
    return markdown.table(["accuracy in %", *head, "seeds"], lines)


def agreement_table(
    here: pd.DataFrame, there: pd.DataFrame, dataset: str, eps: float, name: str, arch: str | None = None
) -> str:
    """Whether runs give the numbers of the same runs in another table: the mean differences, a line a method.

    Another processor, another release of torch or of the training loop rounds differently, and training makes another
    network of that: the differences should be chance, and none bold. Runs are the same if method, network, seed,
    epochs and split are.

    Args:
        name: of the other table, for the head.
    """
    key = ["method", "arch", "seed", "epochs", "split_seed"]
    sides = (select(records, dataset, eps, arch) for records in (here, there))
    both = pd.merge(*sides, on=key, suffixes=("", "_there"))
    shown = 2 * int((both["method"].value_counts() > 1).sum())

    def column(measure: str) -> Column:
        gap = 100 * (both[measure] - both[f"{measure}_there"])
        return NAMES[measure], lambda _, runs: difference(interval(gap[runs.index], max(1, shown)))

    pairs: Column = ("pairs", lambda _, runs: len(runs))
    groups = by_method(both, SHOWN)
    return listing(groups, [column("natural"), column("apgd"), pairs], f"less {name}") + level(shown)


def provenance(records: pd.DataFrame) -> str:
    """Epochs, split, device, versions and dates of the runs, in a line; every value that occurs."""

    def all_of(column: str) -> str:
        return ", ".join(map(str, sorted(records[column].unique())))

    first, last = records["date"].min(), records["date"].max()
    trained = f"{all_of('epochs')} epochs, split seed {all_of('split_seed')}"
    versions = f"torch {all_of('torch')}, Python {all_of('python')}, cktat-loss {all_of('cktat_loss')}"
    return f"{trained}; {all_of('device')}, {versions}, {first if first == last else f'{first} to {last}'}.\n"


def captioned(tables: Mapping[str, str]) -> str:
    """Tables that are not empty, each under its caption."""
    return "\n".join(f"{caption}:\n\n{table}" for caption, table in tables.items() if table)


def each_radius(table: Callable[[pd.DataFrame, str, float], str], records: pd.DataFrame, dataset: str) -> str:
    """A table of each radius of a data set."""
    return captioned({f"eps {radius(eps)}": table(records, dataset, eps) for eps in grid.SETTINGS[dataset].eps})
