"""Markdown tables of the study's records, so that no number in the documentation is typed.

Every function gives "" where nothing was run. Accuracies are in %, the mean over seeds ± their standard deviation;
differences are in points.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from checkpoint import replacing

from lab import runs
from lab.claims import MEASURES, Claim, measures
from lab.records import Record
from lab.selection import by_method, read_on_test, same_eps, values
from lab.statistics import LEVEL, Difference, interval, mean, paired_differences, sd

CHANCE = 0.2  # natural accuracy below which a run has collapsed: ten classes, guessed, give 0.1
BASELINE = "pgd-at"
NAMES = {
    "natural": "natural",
    "pgd20": "PGD-20",
    "cw30": "CW-30",
    "apgd": "APGD",
    "test_natural": "natural",
    "test_pgd20": "PGD-20",
    "test_apgd": "APGD",
    "test_autoattack": "AutoAttack",
}  # of measures, in a table's head


def markdown(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table, or "" without lines."""
    rows = [head, ["---"] * len(head), *lines] if lines else []
    return "".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |\n" for row in rows)


# Cells.


def percent(shares: Sequence[float], of: int | None = None) -> str:
    """Mean ± sd of shares in [0, 1], in %; with their number, where that isn't `of`."""
    if not shares:
        return "-"
    spread = sd(shares)
    text = f"{100 * mean(shares):.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
    return text if of in (None, len(shares)) else f"{text} (n = {len(shares)})"


def points(records: Iterable[Record], measure: str, less: str) -> str:
    """The mean over runs of one measure less another of the same run."""
    pairs = [(getattr(record, measure), getattr(record, less)) for record in records]
    gaps = [100 * (a - b) for a, b in pairs if a is not None and b is not None]
    return signed(mean(gaps)) if gaps else "-"


def signed(value: float) -> str:
    """One decimal, always with its sign; no zero with a minus."""
    text = f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if text[1:] == "0.0" else text


def difference(found: Difference) -> str:
    """The mean and its interval; bold where that leaves out 0."""
    if found.low is None or found.high is None:
        return signed(found.mean)
    text = f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"
    return f"**{text}**" if found.clear else text


def named(text: str, records: Sequence[Record]) -> str:
    """The text, and how many of the runs ended in the constant prediction: a mean over some that did says little."""
    collapsed = sum(record.natural < CHANCE for record in records)
    if not collapsed:
        return text
    of = "" if collapsed == len(records) else f"{collapsed} of {len(records)} "
    return f"{text} ({of}collapsed)"


def radius(eps: float) -> str:
    """As people write it: 0.2, but 8/255."""
    return f"{round(255 * eps)}/255" if same_eps(round(255 * eps) / 255, eps) and eps < 0.1 else f"{eps:g}"


def measured(name: str, records: Iterable[Record]) -> str:
    """What is measured and on which images: AutoAttack is on the first so many."""
    images = "test" if name.startswith("test_") else "validation"
    counts = sorted({*values(records, "test_autoattack_images")}) if name == "test_autoattack" else []
    first = f"first {' or '.join(f'{count:g}' for count in counts)} " if counts else ""
    return f"{NAMES[name]}, {first}{images}"


# Tables.


def methods_table(records: Iterable[Record]) -> str:
    """A line a method that was run: what it is, and its options of train_cktat.py or what the study changes beside.

    Without the points of the sweeps and of the search: their tables say what they are.
    """
    elsewhere = {*runs.TAU_SWEEP, *runs.BETA_SWEEP, *runs.SEARCH} - {*runs.MAIN, *runs.CONTROLS, *runs.ABLATION}
    run = {record.method for record in records} - elsewhere
    lines = []
    for name, method in runs.METHODS.items():
        if name in run:
            options = [f"`{method.options}`"] if method.options else []
            changes = [f"`{field} = {value!r}`" for field, value in method.change.items()]
            lines.append([name, method.about, ", ".join(options + changes) or "-"])
    return markdown(["method", "what it is", "options"], lines)


def main_table(records: Sequence[Record], dataset: str, eps: float, arch: str | None = None) -> str:
    """A line a method: accuracies on the validation images, then the signs of gradient masking."""
    found = by_method(records, dataset, eps, arch)
    gaps = (("pgd20", "apgd"), ("cw30", "apgd"), ("transfer", "apgd"))
    lines = [
        [
            *_accuracies(method, found[method], ("natural", "pgd20", "apgd")),
            *(points(found[method], *gap) for gap in gaps),
            f"{100 * mean(values(found[method], 'zero_gradients')):.1f}",
            len(found[method]),
        ]
        for method in _main(found)
    ]
    head = ["method", "natural", "PGD-20", "APGD", "PGD-20 − APGD", "CW-30 − APGD", "transfer − APGD"]
    return markdown([*head, "zero gradients, %", "seeds"], lines)


def difference_table(records: Sequence[Record], dataset: str, eps: float, against: str = BASELINE) -> str:
    """A line a method but the clean teacher: natural and APGD less those of `against`, seed by seed.

    The intervals are corrected for how many the table shows. Bold: leaves out 0.
    """
    found = by_method(records, dataset, eps)
    here = [record for of in found.values() for record in of]
    pairs = {
        method: [paired_differences(here, method, against, measure) for measure in ("natural", "apgd")]
        for method in _main(found)
        if method not in ("clean", against)
    }
    pairs = {method: of for method, of in pairs.items() if all(of)}
    shown = sum(len(differences) > 1 for of in pairs.values() for differences in of)
    lines = [
        [named(method, found[method]), *(difference(interval(of, max(1, shown))) for of in both), len(both[0])]
        for method, both in pairs.items()
    ]
    return markdown(["method", f"natural − {against}", f"APGD − {against}", "pairs"], lines) + _level(shown)


def search_table(records: Sequence[Record], dataset: str) -> str:
    """A line a change that the search for a recipe tried, at the data set's first radius, and what came of it.

    The differences are from the method that was changed, seed by seed; without intervals, for which a search has too
    few seeds: it chooses what to look at, and shows nothing.
    """
    found = by_method(records, dataset, runs.SETTINGS[dataset].eps[0])
    here = [record for of in found.values() for record in of]
    lines = []
    for method in (m for m in runs.SEARCH if m in found):
        bases = ("pgd-at-warm", "pgd-at-weighted", BASELINE, "trades", "adaptive-cold", "adaptive")
        base = next(name for name in bases if method.startswith(name))
        changes = [paired_differences(here, method, base, measure) for measure in ("natural", "apgd")]
        cells = [signed(mean(of)) if of else "-" for of in changes]
        gap = points(found[method], "pgd20", "apgd")
        accuracies = _accuracies(method, found[method], ("natural", "apgd"))
        about = runs.METHODS[method].about
        lines.append([accuracies[0], about, *accuracies[1:], base, *cells, gap, len(found[method])])
    head = ["method", "what it is", "natural", "APGD", "less", "natural", "APGD", "PGD-20 − APGD", "seeds"]
    return markdown(head, lines)


def ablation_table(records: Sequence[Record], dataset: str = "digits") -> str:
    """The paper's Table 3a: the recipe with a part less each."""
    return _list(records, dataset, {method: method for method in runs.ABLATION}, "method", about=True)


def tau_table(records: Sequence[Record], dataset: str = "digits") -> str:
    """The paper's Table 3b: a line a temperature of the teacher."""
    return _list(records, dataset, dict(zip(runs.TAU_SWEEP, map(str, runs.TAUS), strict=True)), "tau")


def beta_table(records: Sequence[Record], dataset: str = "digits") -> str:
    """The paper's Table 3c: a line a weight of the consistency."""
    return _list(records, dataset, dict(zip(runs.BETA_SWEEP, map(str, runs.BETAS), strict=True)), "beta")


def capacity_table(records: Sequence[Record], dataset: str = "digits") -> str:
    """The paper's Table 1: natural / APGD, a line a method that was run at two widths or more, a column a width."""
    eps = runs.SETTINGS[dataset].eps[0]
    found = {arch: by_method(records, dataset, eps, arch) for arch in runs.WIDTHS}
    lines = []
    for method in dict.fromkeys((*runs.CAPACITY, *runs.LARGER)):
        cells = [found[arch].get(method, []) for arch in runs.WIDTHS]
        if sum(map(bool, cells)) > 1:
            both = [" / ".join(percent(values(of, measure)) for measure in ("natural", "apgd")) for of in cells]
            texts = [named(text, of) if of else "-" for text, of in zip(both, cells, strict=True)]
            lines.append([method, *texts, _counts(cells)])
    widths = [f"width {arch.partition('-')[2] or 16}: natural / APGD" for arch in runs.WIDTHS]
    return markdown(["method", *widths, "seeds"], lines)


def test_table(records: Iterable[Record], dataset: str, eps: float) -> str:
    """A line a method whose test images were read."""
    found = read_on_test(by_method(records, dataset, eps))
    # A claim can be about any method.
    methods = dict.fromkeys((*_main(found), *found))
    lines = [[*_accuracies(method, found[method], MEASURES), len(found[method])] for method in methods]
    here = [record for of in found.values() for record in of]
    return markdown(["method", *(measured(name, here) for name in MEASURES), "seeds"], lines)


def claims_table(records: Sequence[Record], claims: Sequence[Claim]) -> str:
    """A line a claim, once one of them can be judged; the intervals are corrected for all of them.

    A claim holds where the whole interval is above 0, and is refuted where all of it is below.
    """
    lines, judged = [], False
    for claim in claims:
        found = by_method(records, claim.dataset, claim.eps)
        both = [*found.get(claim.better, []), *found.get(claim.worse, [])]
        here = [record for record in both if record.seed < claim.seeds]
        differences = paired_differences(here, claim.better, claim.worse, claim.measure)
        where = [
            f"{claim.dataset}, eps {radius(claim.eps)}",
            f"{claim.better} > {claim.worse}",
            measured(claim.measure, here),
        ]
        if len(differences) < claim.seeds:
            lines.append([*where, "-", "-", f"{len(differences)} of {claim.seeds}"])
            continue
        judged = True
        result = interval(differences, len(claims))
        low, high = result.low or 0, result.high or 0
        verdict = "yes" if low > 0 else "no" if high < 0 else "not shown"
        lines.append([*where, difference(result), verdict, len(differences)])
    table = markdown(["where", "claim", "of", "difference", "holds", "pairs"], lines if judged else [])
    return table and table + _level(len(claims))


def compact_table(records: Sequence[Record], claims: Sequence[Claim]) -> str:
    """A line a main method, and each that a claim is about; of each data set, at its first radius, natural accuracy and
    APGD on the validation images, and what the claims are of on the test images, where those have been read."""
    found = {dataset: by_method(records, dataset, setting.eps[0]) for dataset, setting in runs.SETTINGS.items()}
    found = {dataset: of for dataset, of in found.items() if of}
    columns, head = [], []
    for dataset, of in found.items():
        here = [record for some in of.values() for record in some]
        for name in ("natural", "apgd", *(name for name in measures(dataset, claims) if values(here, name))):
            columns.append((dataset, name))
            head.append(f"{dataset}, eps {radius(runs.SETTINGS[dataset].eps[0])}, {measured(name, here)}")
    lines = []
    for method in dict.fromkeys((*runs.MAIN, *(name for claim in claims for name in (claim.better, claim.worse)))):
        cells = {dataset: of.get(method, []) for dataset, of in found.items()}
        if any(cells.values()):
            texts = [percent(values(cells[dataset], name), len(cells[dataset])) for dataset, name in columns]
            for i, (dataset, name) in enumerate(columns):
                texts[i] = named(texts[i], cells[dataset]) if name == "natural" else texts[i]
            lines.append([method, *texts, _counts([*cells.values()])])
    return markdown(["accuracy in %", *head, "seeds"], lines)


def agreement(
    here: Sequence[Record], there: Sequence[Record], dataset: str, eps: float, arch: str | None = None
) -> str:
    """Where the runs of one study have other numbers than the same runs of another, docs/study.md's; a line a method.

    The same seed on another processor rounds differently, and training makes another network of that: the differences
    should be chance, and none bold. Runs are the same if all that they were told is: options, epochs and split too.
    """

    def key(record: Record) -> tuple[object, ...]:
        return record.method, record.arch, record.seed, record.options, record.epochs, record.split_seed

    ours, theirs = (
        {key(record): record for of in by_method(records, dataset, eps, arch).values() for record in of}
        for records in (here, there)
    )
    both = [(ours[run], theirs[run]) for run in ours if run in theirs]
    gaps: dict[str, list[tuple[float, float]]] = {}
    for a, b in both:
        gaps.setdefault(a.method, []).append((100 * (a.natural - b.natural), 100 * (a.apgd - b.apgd)))
    others = {method: of for method, of in gaps.items() if max(abs(gap) for pair in of for gap in pair) > 1e-3}
    if not both:
        return ""
    if not others:
        return f"All {len(both)} runs that docs/study.md has too gave the same numbers.\n"
    shown = 2 * sum(len(of) > 1 for of in others.values())
    lines = [
        [method, *(difference(interval(gap, max(1, shown))) for gap in zip(*of, strict=True)), len(of)]
        for method, of in others.items()
    ]
    table = markdown(["here − docs/study.md", "natural", "APGD", "pairs"], lines) + _level(shown)
    same = "" if len(others) == len(gaps) else "\nAll other methods gave the same numbers.\n"
    return table + same


def provenance(records: Sequence[Record]) -> str:
    """Epochs, split, device, versions and dates of the runs, in a line; every value that occurs."""

    def all_of(field: str) -> str:
        return ", ".join(map(str, sorted({getattr(record, field) for record in records})))

    if not records:
        return ""
    dates = sorted(record.date for record in records)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    trained = f"{all_of('epochs')} epochs, split seed {all_of('split_seed')}"
    versions = f"torch {all_of('torch')}, Python {all_of('python')}, cktat-loss {all_of('cktat_loss')}"
    return f"{trained}; {all_of('device')}, {versions}, {when}.\n"


def _main(found: Mapping[str, object]) -> list[str]:
    """Those of the main table's methods that were found, in its order."""
    return [method for method in dict.fromkeys((*runs.MAIN, *runs.CONTROLS)) if method in found]


def _accuracies(method: str, records: Sequence[Record], measures: Sequence[str]) -> list[str]:
    cells = [percent(values(records, measure), of=len(records)) for measure in measures]
    return [named(method, records), *cells]


def _list(records: Sequence[Record], dataset: str, labels: dict[str, str], head: str, about: bool = False) -> str:
    """A line a method under its label, at the data set's first radius."""
    found = by_method(records, dataset, runs.SETTINGS[dataset].eps[0])
    lines = []
    for method, label in labels.items():
        of = found.get(method, [])
        cells = _accuracies(label, of, ("natural", "pgd20", "apgd"))
        lines.append([cells[0], *([runs.METHODS[method].about] if about else []), *cells[1:], len(of)])
    # The recipe itself is run for the main table: alone it is no sweep.
    enough = sum(method in found for method in labels) > 1
    what = ["what it is"] if about else []
    return markdown([head, *what, "natural", "PGD-20", "APGD", "seeds"], lines if enough else [])


def _level(comparisons: int) -> str:
    """What the intervals of a table hold at, in a line below it; "" where it has none."""
    of = "the interval" if comparisons == 1 else f"all {comparisons} intervals together, by Bonferroni's correction"
    return f"\n{100 * LEVEL:g} % for {of}.\n" if comparisons else ""


def _counts(cells: Sequence[Sequence[Record]]) -> str:
    """How many runs each cell is of; one number where all are alike."""
    counts = [str(len(of)) for of in cells]
    return counts[0] if len({*counts}) == 1 else " / ".join(counts)


# Files.


def replaced(text: str, name: str, content: str) -> str:
    """The text, with the content between the markers of that name.

    Raises:
        ValueError: the text has not one marker of each kind, the beginning first.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    start, stop = text.find(begin), text.find(end)
    if text.count(begin) != 1 or text.count(end) != 1 or stop < start:
        raise ValueError(f"the text must have the markers {begin} and {end} once each, in this order")
    body = f"\n{content.strip()}\n\n" if content else ""
    return f"{text[:start]}{begin}\n{body}{text[stop:]}"


def write_blocks(path: Path, blocks: Mapping[str, str]) -> None:
    """Put each content between the markers of its name in a Markdown file: all of them, or on an error none.

    Raises:
        ValueError: a marker is missing.
    """
    text = path.read_text(encoding="utf-8")
    for name, content in blocks.items():
        try:
            text = replaced(text, name, content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    with replacing(path) as file:
        file.write(text.encode())


def captioned(of: Mapping[str, str]) -> str:
    """Tables that are not empty, each under its caption."""
    return "\n".join(f"{caption}:\n\n{table}" for caption, table in of.items() if table)


def each_radius(table: Callable[[Sequence[Record], str, float], str], records: Sequence[Record], dataset: str) -> str:
    """A table of each radius of a data set."""
    return captioned({f"eps {radius(eps)}": table(records, dataset, eps) for eps in runs.SETTINGS[dataset].eps})
