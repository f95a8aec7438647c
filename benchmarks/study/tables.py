"""The study's tables in Markdown, from its CSVs, so that no number in the documentation is typed.

Accuracies are in %, mean ± standard deviation over seeds. Differences are in points, paired by seed, and bold if their
interval leaves out 0. A table without lines is "".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import isnan, nan
from statistics import fmean

import pandas as pd
from scipy.stats import ttest_1samp

from benchmarks import markdown
from benchmarks.study import grid
from benchmarks.study.claims import CLAIMS, FIRST, SECOND, Claim
from benchmarks.study.grid import METHODS, SETTINGS, SHOWN

NAMES = {"natural": "natural", "pgd20": "PGD-20", "cw30": "CW-30", "apgd": "APGD", "transfer": "transfer"}
NAMES |= {"autoattack": "AutoAttack"}
TESTS = ("test_natural", "test_pgd20", "test_apgd", "test_autoattack")
COLLAPSED, DEAD = 0.2, 0.5  # natural accuracies; a constant prediction has 0.1
EACH = "\n95 % for each interval by itself.\n"
Groups = Mapping[str, pd.DataFrame]  # the runs of each line of a table
Column = tuple[str, Callable[[str, pd.DataFrame], object]]  # a head, and the cell of a line from its name and runs

# Rows and pairs.


def select(runs: pd.DataFrame, dataset: str, eps: float | None = None, arch: str = "digits") -> pd.DataFrame:
    """Return the rows of a data set. `eps` None: its first radius."""
    own = (runs["dataset"] == dataset) & (runs["arch"] == arch)
    return runs[own & (runs["eps"] == (SETTINGS[dataset].eps[0] if eps is None else eps))]


def by_method(runs: pd.DataFrame, methods: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Return the rows of each method that has any, in the order of `methods`."""
    groups = dict(iter(runs.groupby("method", sort=False)))
    return {method: groups[method] for method in dict.fromkeys(methods) if method in groups}


def paired(ours: pd.DataFrame, theirs: pd.DataFrame, measure: str, *same: str) -> pd.Series:
    """Return the differences in points of the runs that agree in data, split, network, radius, seed and `same`.

    A run that is there twice is a ValueError.
    """
    pair = ["dataset", "split_seed", "arch", "eps", "seed", *same]
    if measure == "test_autoattack":  # accuracies on different images are no pair
        pair.append("test_autoattack_images")
    ours, theirs = (runs[[*pair, measure]].dropna() for runs in (ours, theirs))
    both = ours.merge(theirs, on=pair, validate="one_to_one")
    return 100 * (both[f"{measure}_x"] - both[f"{measure}_y"])


def interval(differences: pd.Series, comparisons: int = 1) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % interval, by Student's t and Bonferroni for so many comparisons.

    There is no interval (NaN) for one pair, or if all differences are equal: then the images are too few to tell the
    seeds apart, and an interval of no width would claim a certainty.
    """
    if len(differences) < 2 or differences.std() < 1e-3:  # points; a CSV has six digits
        return differences.mean(), nan, nan
    low, high = ttest_1samp(differences, 0).confidence_interval(1 - 0.05 / comparisons)
    return differences.mean(), low, high


# Cells.


def percent(shares: pd.Series) -> str:
    """Format the mean and the spread of the values that are not missing."""
    known = shares.dropna()
    spread = f" ± {100 * known.std():.1f}" if len(known) > 1 else ""
    return f"{100 * fmean(known):.1f}{spread}" if len(known) else "-"


def signed(value: float) -> str:
    """Format a difference with its sign. Zero has none, and NaN becomes a dash."""
    text = f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "-" if isnan(value) else "0.0" if text[1:] == "0.0" else text


def difference(differences: pd.Series, comparisons: int = 1) -> str:
    """Format a mean difference and its interval."""
    mean, low, high = interval(differences, comparisons)
    text = signed(mean) if isnan(low) else f"{signed(mean)} [{signed(low)}, {signed(high)}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def verdict(differences: pd.Series, comparisons: int, wanted: int) -> list[object]:
    """Return the cells "difference", "holds" and "pairs" of a claim. It is judged once all wanted pairs are there."""
    if len(differences) < wanted:
        return ["-", "-", f"{len(differences)} of {wanted}"]
    _, low, high = interval(differences, comparisons)
    holds = "yes" if low > 0 else "no" if high < 0 else "not shown"
    return [difference(differences, comparisons), holds, len(differences)]


def level(comparisons: int) -> str:
    """Return the line below a table that says how its intervals are corrected."""
    return f"\n95 % for all {comparisons} intervals together, by Bonferroni's correction.\n" if comparisons else ""


def named(text: str, runs: pd.DataFrame) -> str:
    """Append how many runs collapsed to a constant prediction, because a mean over them says little."""
    collapsed = int((runs["natural"] < COLLAPSED).sum())
    some = "" if collapsed == len(runs) else f"{collapsed} of {len(runs)} "
    return f"{text} ({some}collapsed)" if collapsed else text


def place(dataset: str, eps: float | None = None) -> str:
    """Name a data set and a radius. `eps` None: its first radius."""
    return f"{dataset}, eps {SETTINGS[dataset].eps[0] if eps is None else eps:g}"


def measured(name: str, runs: pd.DataFrame) -> str:
    """Name a measure and its images. AutoAttack has the first so many test images."""
    first = f"first {runs['test_autoattack_images'].max():g} " if name == "test_autoattack" else ""
    return f"{NAMES[name.removeprefix('test_')]}, {first}{'test' if name.startswith('test_') else 'validation'}"


def accuracy(measure: str, head: str = "") -> Column:
    """Return a column of means and standard deviations."""
    return head or NAMES[measure], lambda _, runs: percent(runs[measure])


def gap(measure: str) -> Column:
    """Return a column of mean differences from APGD, a sign of gradient masking."""
    return f"{NAMES[measure]} − APGD", lambda _, runs: signed(100 * (runs[measure] - runs["apgd"]).mean())


ABOUT: Column = ("what it is", lambda method, _: METHODS[method].about)
SEEDS: Column = ("seeds", lambda _, runs: len(runs))
ZERO: Column = ("zero gradients, %", lambda _, runs: f"{100 * runs['zero_gradients'].mean():.1f}")
NATURAL, APGD = accuracy("natural"), accuracy("apgd")
ACCURACIES = NATURAL, accuracy("pgd20"), APGD

# Tables.


def listing(groups: Groups, columns: Sequence[Column], head: str = "method") -> str:
    """Return a table with one line per group."""
    lines = [[named(name, runs), *(cell(name, runs) for _, cell in columns)] for name, runs in groups.items()]
    return markdown.table([head, *(name for name, _ in columns)], lines)


def methods_table(runs: pd.DataFrame) -> str:
    """Return the settings of the methods. The tables of the sweeps and of the search explain theirs."""
    shown = [name for name in by_method(runs, METHODS) if METHODS[name].group in ("main", "control", "part", "other")]
    lines = [[name, METHODS[name].about, f"`{METHODS[name].settings}`"] for name in (*shown, "ramp-beta0")]
    return markdown.table(["method", "what it is", "settings"], lines).replace("``", "the defaults")


def main_table(runs: pd.DataFrame, dataset: str, eps: float, more: Sequence[str] = ()) -> str:
    """Return accuracies on validation images, then signs of gradient masking, of SHOWN and `more`."""
    columns = *ACCURACIES, gap("pgd20"), gap("cw30"), gap("transfer"), ZERO, SEEDS
    return listing(by_method(select(runs, dataset, eps), (*SHOWN, *more)), columns)


def page_table(runs: pd.DataFrame, dataset: str) -> str:
    """Return the table of docs/study.md: accuracies, and the lead over PGD-AT as in `difference_table`."""
    groups = by_method(select(runs, dataset), SHOWN)
    leads = {method: paired(own, groups["pgd-at"], "apgd", "epochs") for method, own in groups.items()}
    shown = 2 * (len(groups) - len(grid.NEEDED))
    lead = lambda method, _: "-" if method in grid.NEEDED else difference(leads[method], shown)  # noqa: E731
    return listing(groups, [ABOUT, NATURAL, APGD, ("APGD − pgd-at", lead), SEEDS]) + level(shown)


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
    """Return the search for a recipe: each method less the one that it changes. Its seeds are too few for intervals."""
    groups = by_method(select(runs, dataset), METHODS)
    changed = {name: max((shown for shown in SHOWN if name.startswith(shown)), key=len) for name in grid.SEARCH}

    def change(measure: str) -> Column:
        def cell(method: str, own: pd.DataFrame) -> str:
            return signed(paired(own, groups.get(changed[method], own[:0]), measure).mean())

        return NAMES[measure], cell

    less: Column = ("less", lambda method, _: changed[method])
    columns = [ABOUT, NATURAL, APGD, less, change("natural"), change("apgd"), gap("pgd20"), SEEDS]
    return listing({name: group for name, group in groups.items() if name in changed}, columns)


def paper_table(runs: pd.DataFrame, labels: Mapping[str, object], head: str, *more: Column) -> str:
    """Return one of the paper's Tables 3a, 3b and 3c on digits. `labels` has the text of each method's line."""
    groups = by_method(select(runs, "digits"), labels)
    return listing({str(labels[name]): group for name, group in groups.items()}, [*more, *ACCURACIES, SEEDS], head)


def capacity_table(runs: pd.DataFrame, dataset: str, eps: float) -> str:
    """Return the paper's Table 1: natural / APGD, one column per width, of methods with two widths or more."""
    lines = []
    for method, group in by_method(runs, (*grid.CAPACITY, *grid.LARGER)).items():
        found = [select(group, dataset, eps, arch) for arch in grid.WIDTHS]
        cells = [f"{percent(own['natural'])} / {percent(own['apgd'])}" if len(own) else "-" for own in found]
        counts = [str(len(own)) for own in found]
        if len(found) - counts.count("0") > 1:
            seeds = counts[0] if len({*counts}) == 1 else " / ".join(counts)
            lines.append([method, *map(named, cells, found), seeds])
    widths = [f"width {arch.partition('-')[2] or 16}: natural / APGD" for arch in grid.WIDTHS]
    return markdown.table(["method", *widths, "seeds"], lines)


def test_table(runs: pd.DataFrame, dataset: str, eps: float) -> str:
    """Return the accuracies on test images of the methods that were read."""
    found = select(runs, dataset, eps).dropna(subset=["test_natural"])
    columns = [accuracy(name, measured(name, found)) for name in TESTS]
    return listing(by_method(found, (*SHOWN, *found["method"])), [*columns, SEEDS])


def claims_table(runs: pd.DataFrame, claims: Sequence[Claim], comparisons: int) -> str:
    """Return the claims and their outcome, corrected for so many claims: those of earlier rounds count too."""
    lines = []
    for claim in claims:
        found = select(runs, claim.dataset, claim.eps)
        found = found[found["seed"].isin(claim.seeds)]
        sides = [found[found["method"] == method] for method in (claim.better, claim.worse)]
        where = place(claim.dataset, claim.eps), f"{claim.better} > {claim.worse}"
        of, pairs = measured(claim.measure, pd.concat(sides)), paired(*sides, claim.measure)
        lines.append([*where, of, *verdict(pairs, comparisons, len(claim.seeds))])
    return markdown.table(["where", "claim", "of", "difference", "holds", "pairs"], lines) + level(comparisons)


def readme_table(runs: pd.DataFrame) -> str:
    """Return the README's table: natural and robust accuracy on test images, with the number of seeds in the cell."""
    found = {dataset: select(runs, dataset).dropna(subset=["test_natural"]) for dataset in SETTINGS}
    robust = {claim.dataset: claim.measure for claim in FIRST}
    columns = [(dataset, measure) for dataset in SETTINGS for measure in ("test_natural", robust[dataset])]
    lines = []
    for method, group in by_method(pd.concat(found.values()), SHOWN).items():
        values = [group.loc[group["dataset"] == dataset, measure] for dataset, measure in columns]
        lines.append(
            [named(method, group), *(f"{percent(own)} (n = {len(own)})" if len(own) else "-" for own in values)]
        )
    heads = [f"{place(dataset)}: {measured(measure, found[dataset])}" for dataset, measure in columns]
    return markdown.table(["method", *heads], lines)


def replication_table(runs: pd.DataFrame) -> str:
    """Return the replication: runs with another split and other seeds, and with terms added to the methods."""
    first = ("pgd-at", "pgd-at-weighted-cold", "adaptive", "adaptive-cold", "literal", "literal-tau2", "detach")
    ordered = runs.assign(method=pd.Categorical(runs["method"], [*first, "detach-tau2"]))
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
    parts = {}
    for where, found in (("the study", runs), ("the replication", again)):
        parts[where] = paired(*(found[found["method"] == names[guided]] for guided in (1, 0)), "apgd")
    parts["both"] = pd.concat(parts.values())
    lines = [[name, difference(values), len(values)] for name, values in parts.items()]
    return markdown.table(["runs of", "APGD, adaptive-clean-guidance − adaptive", "pairs"], lines) + EACH


def provenance(runs: pd.DataFrame) -> str:
    """Return a line with every value of epochs, split, device, versions and dates that occurs."""
    names = ("epochs", "split_seed", "device", "torch", "python", "cktat_loss")
    values = [", ".join(map(str, sorted(runs[name].unique()))) for name in names]
    dates = " to ".join(sorted({runs["date"].min(), runs["date"].max()}))
    text = "{} epochs, split seed {}; {}, torch {}, Python {}, cktat-loss {}, {}.\n".format(*values, dates)
    return f"\n{grid.VALIDATION} validation images; {text}"


def captioned(table: Callable[[pd.DataFrame, str, float], str], runs: pd.DataFrame, dataset: str | None = None) -> str:
    """Return the tables of all radii under captions, without the empty ones. `dataset` None: of all data sets."""
    places = [(name, eps) for name in ([dataset] if dataset else SETTINGS) for eps in SETTINGS[name].eps]
    found = {(f"eps {eps:g}" if dataset else place(name, eps)): table(runs, name, eps) for name, eps in places}
    return "\n".join(f"{caption}:\n\n{text}" for caption, text in found.items() if text)


def published(name: str) -> pd.DataFrame:
    """Return a committed CSV: "runs" and "curves" are by version 0.1.0, "runs-0.2" by 0.2, and so on."""
    return pd.read_csv(grid.RESULTS / f"{name}.csv")


def blocks() -> dict[str, str]:
    """Return all tables of the published runs, by the name of their block."""
    runs, second, third, replication = map(published, ("runs", "runs-0.2", "runs-0.3", "replication"))
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
