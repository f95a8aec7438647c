"""The study's report: statistics by hand, tables and figures of made-up runs, and files of which only blocks change."""

import math
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.examples_path import EXAMPLES, imported

image = pytest.importorskip("matplotlib.image")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

MODULES = ("claims", "figures", "records", "report", "runs", "selection", "statistics", "tables")


@pytest.fixture(scope="module")
def lab():
    with imported(*(f"lab.{name}" for name in MODULES)) as modules:
        yield modules


def made_up(lab: SimpleNamespace, method: str, seed: int = 0, natural: float = 0.9, apgd: float = 0.7, **other):
    """A run; PGD-20 is 5 points above APGD, CW-30 2 points."""
    values = {
        "dataset": "digits", "arch": "digits", "method": method, "options": "", "eps": 0.2, "seed": seed,
        "split_seed": 2026, "epochs": 15, "natural": natural, "pgd20": apgd + 0.05, "cw30": apgd + 0.02, "apgd": apgd,
        "apgd_ce": apgd + 0.01, "transfer": None, "zero_gradients": 0.25, "nonlinearity": 0.1, "confidence": 0.8,
        "test_natural": None, "test_pgd20": None, "test_apgd": None, "test_autoattack": None,
        "test_autoattack_images": None, "train_seconds": 12.5, "measure_seconds": 3.0, "device": "cpu",
        "python": "3.11.7", "torch": "2.14.1", "cktat_loss": "0.1.0", "date": "2026-11-23",
    }  # fmt: skip
    return lab.records.Record(**values | other)


def seeds(lab: SimpleNamespace, method: str, apgd: list[float], natural: float = 0.9, **other) -> list:
    return [made_up(lab, method, seed, natural + seed / 500, value, **other) for seed, value in enumerate(apgd)]


def made_up_epoch(lab: SimpleNamespace, method: str, seed: int, epoch: int, clean: float, pgd: float, **other):
    values = {"dataset": "digits", "arch": "digits", "method": method, "eps": 0.2, "seed": seed, "epoch": epoch}
    measures = {"clean_accuracy": clean, "pgd_accuracy": pgd, "guidance": None, "consistency": 0.25}
    shares = {f"label_probability_p{p:02}": (p + seed) / 100 + epoch / 1000 for p in (5, 25, 50, 75, 95)}
    return lab.records.Epoch(**values | measures | shares | other)


def curves_of(lab: SimpleNamespace, *methods: str) -> list:
    """Two seeds of 11 epochs: clean accuracy 0.5 + epoch / 100, and PGD accuracy 0.3; the second seed 0.02 above."""
    return [
        made_up_epoch(lab, method, seed, epoch, 0.5 + epoch / 100 + seed / 50, 0.3 + seed / 50)
        for method in methods
        for seed in (0, 1)
        for epoch in range(11)
    ]


def cells(table: str) -> list[list[str]]:
    """A table's lines without the rule below the head."""
    lines = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[:1] + lines[2:]]


# Statistics.


def test_interval_by_hand(lab) -> None:
    """t with 4 degrees of freedom: 2.776445 at 0.975, 4.604095 at 0.995, which is 5 comparisons."""
    alone = lab.statistics.interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (alone.mean, alone.n) == (3, 5)
    assert (alone.low, alone.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)
    assert alone.clear
    among = lab.statistics.interval([1, 2, 3, 4, 5], comparisons=5)
    half = 4.604095 * math.sqrt(2.5) / math.sqrt(5)
    assert (among.low, among.high) == pytest.approx((3 - half, 3 + half), rel=1e-6)
    assert not among.clear


@pytest.mark.parametrize(
    "differences", [[2.0], [2.0, 2.0, 2.0], [100 * (0.976667 - 0.973333), 100 * (0.98 - 0.976667)]]
)
def test_no_interval_without_spread(lab, differences) -> None:
    """One seed tells nothing about spread; several with the same difference are no certainty either.

    The last are one image of 300 each, as a CSV rounds accuracies.
    """
    result = lab.statistics.interval(differences)
    assert (result.low, result.high, result.clear) == (None, None, False)
    assert result.mean == pytest.approx(differences[0], abs=1e-3)


def test_mean_and_sd_by_hand(lab) -> None:
    assert lab.statistics.mean([1, 2, 6]) == 3
    assert lab.statistics.sd([1, 2, 6]) == pytest.approx(math.sqrt(7))
    assert lab.statistics.sd([1]) is None


def test_pairs_share_all_but_the_method(lab) -> None:
    ours, theirs = seeds(lab, "ramp", [0.70, 0.75, 0.80]), seeds(lab, "pgd-at", [0.60, 0.70, 0.71, 0.1])
    unpaired = [replace(ours[0], seed=7), replace(ours[0], seed=8, apgd=None), replace(theirs[0], seed=8)]
    other = [replace(ours[0], seed=3, eps=0.12), replace(ours[0], seed=3, arch="digits-4")]
    paired = lab.statistics.paired_differences
    everything = [*theirs, *reversed(ours), *unpaired, *other, made_up(lab, "trades", 3)]
    assert paired(everything, "ramp", "pgd-at", "apgd") == pytest.approx([10, 5, 9])
    assert paired(everything, "pgd-at", "ramp", "apgd") == pytest.approx([-10, -5, -9])
    assert paired(everything, "ramp", "pgd-at", "test_apgd") == []
    with pytest.raises(ValueError, match=r"got two of ramp with digits, digits, eps 0\.2 and seed 0"):
        paired([*ours, ours[0]], "ramp", "pgd-at", "apgd")


def test_a_radius_from_a_csv_is_the_settings_one(lab, tmp_path) -> None:
    """8/255 is written with six digits."""
    before = [made_up(lab, "ramp", dataset="cifar10", arch="resnet18", eps=8 / 255)]
    lab.records.write(tmp_path / "runs.csv", before, lab.records.Record)
    after = lab.records.read_runs(tmp_path / "runs.csv")
    assert after[0].eps != before[0].eps
    assert lab.selection.by_method(after, "cifar10", 8 / 255) == {"ramp": after}
    assert lab.selection.by_method(after, "cifar10", 4 / 255) == {}
    theirs = replace(before[0], method="pgd-at", apgd=0.5)
    assert lab.statistics.paired_differences([*after, theirs], "ramp", "pgd-at", "apgd") == pytest.approx([20])


# Tables.


def test_main_table(lab) -> None:
    records = [
        *seeds(lab, "adaptive", [0.70, 0.72, 0.74], transfer=0.9),
        *seeds(lab, "pgd-at", [0.7]),
        *seeds(lab, "pgd-at-warm", [0.5, 0.5]),
        *seeds(lab, "literal", [0.1, 0.1], natural=0.1),
        *seeds(lab, "detach", [0.1, 0.1], natural=0.1995),  # one below 20 %, one above
        *seeds(lab, "adaptive", [0.1], eps=0.12),
        *seeds(lab, "ramp", [0.1], dataset="mnist5k"),
        *seeds(lab, "ramp", [0.1], arch="digits-4"),
    ]
    head, *lines = cells(lab.tables.main_table(records, "digits", 0.2))
    table = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert list(table) == ["pgd-at", "literal (collapsed)", "detach (1 of 2 collapsed)", "adaptive", "pgd-at-warm"]
    assert table["adaptive"] == {
        "method": "adaptive",
        "natural": "90.2 ± 0.2",
        "PGD-20": "77.0 ± 2.0",
        "APGD": "72.0 ± 2.0",
        "PGD-20 − APGD": "+5.0",
        "CW-30 − APGD": "+2.0",
        "transfer − APGD": "+18.0",
        "zero gradients, %": "25.0",
        "seeds": "3",
    }
    assert (table["pgd-at"]["APGD"], table["pgd-at"]["transfer − APGD"], table["pgd-at"]["seeds"]) == ("70.0", "-", "1")
    assert lab.tables.main_table(records, "cifar10", 8 / 255) == ""


def test_a_recipe_added_to_the_main_ones_is_in_the_tables(lab, monkeypatch) -> None:
    records = [*seeds(lab, "new", [0.7, 0.8]), *seeds(lab, "pgd-at", [0.6, 0.65]), *seeds(lab, "other", [0.6])]
    monkeypatch.setattr(lab.runs, "MAIN", (*lab.runs.MAIN, "new"))
    assert [line[0] for line in cells(lab.tables.main_table(records, "digits", 0.2))] == ["method", "pgd-at", "new"]
    assert [line[0] for line in cells(lab.tables.difference_table(records, "digits", 0.2))] == ["method", "new"]


def test_differences_are_corrected_for_all_that_are_shown_and_bold_where_clear(lab) -> None:
    base = [0.70, 0.71, 0.72, 0.73, 0.74]
    ours = [apgd + gain for apgd, gain in zip(base, [0.01, 0.02, 0.03, 0.04, 0.05], strict=True)]
    records = [*seeds(lab, "pgd-at", base), *seeds(lab, "ramp", ours), *seeds(lab, "clean", [0.0])]
    (_, line) = cells(lab.tables.difference_table(records, "digits", 0.2))
    # Two are shown; t with 4 degrees of freedom at 1 - 0.05 / 4 is 3.495406, and the half width 2.47.
    assert line == ["ramp", "0.0", "**+3.0 [+0.5, +5.5]**", "5"]
    below = lab.tables.difference_table(records, "digits", 0.2).splitlines()[-1]
    assert below == "95 % for all 2 intervals together, by Bonferroni's correction."
    alone = seeds(lab, "adaptive", [0.9])
    *_, with_one = cells(lab.tables.difference_table([*records, *alone], "digits", 0.2))
    assert with_one == ["adaptive", "0.0", "+20.0", "1"]
    # With two more methods six are shown: 4.851 half widths of 0.707 no longer leave out 0.
    more = [*seeds(lab, "trades", ours), *seeds(lab, "adaptive", ours[::-1])]
    _, _, six, _ = cells(lab.tables.difference_table([*records, *more], "digits", 0.2))
    assert six[2].startswith("+3.0 [−")
    # The other way round.
    worse = [replace(record, method={"ramp": "pgd-at", "pgd-at": "ramp"}[record.method]) for record in records[:10]]
    assert cells(lab.tables.difference_table(worse, "digits", 0.2))[1][2] == "**−3.0 [−5.5, −0.5]**"
    assert lab.tables.difference_table(records[5:], "digits", 0.2) == ""


def test_sweeps_show_what_is_missing(lab) -> None:
    records = [*seeds(lab, "ramp", [0.7]), *seeds(lab, "ramp-tau2", [0.6, 0.6]), *seeds(lab, "ramp-cold", [0.5])]
    _, *lines = cells(lab.tables.tau_table(records))
    assert [line[0] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    assert lines[0] == ["1", "-", "-", "-", "0"]
    assert lines[1][2:] == ["65.0 ± 0.0", "60.0 ± 0.0", "2"]
    assert lines[4][2:] == ["75.0", "70.0", "1"]
    assert lab.tables.beta_table(records) == ""  # ramp alone is no sweep
    assert [(line[0], line[-1]) for line in cells(lab.tables.ablation_table(records))[1:]] == [
        ("ramp", "1"), ("ramp-cold", "1"), ("ramp-no-guidance", "0"), ("ramp-beta0", "0"),
    ]  # fmt: skip


def test_capacity_has_a_column_a_width(lab) -> None:
    records = [
        *seeds(lab, "ramp", [0.7, 0.8], arch="digits-4"),
        *seeds(lab, "ramp", [0.7]),
        *seeds(lab, "teacher-only", [0.1], arch="digits-32"),
        *seeds(lab, "pgd-at", [0.6]),
        *seeds(lab, "pgd-at", [0.1], natural=0.1, arch="digits-32"),
    ]
    head, *lines = cells(lab.tables.capacity_table(records))
    assert [cell.split(":")[0] for cell in head[1:4]] == ["width 4", "width 16", "width 32"]
    assert lines == [
        ["pgd-at", "-", "90.0 / 60.0", "10.0 / 10.0 (collapsed)", "0 / 1 / 1"],
        ["ramp", "90.1 ± 0.1 / 75.0 ± 7.1", "90.0 / 70.0", "-", "2 / 1 / 0"],
    ]


def test_a_search_is_measured_against_what_it_changed(lab) -> None:
    records = [
        *seeds(lab, "adaptive", [0.70, 0.72, 0.99]),
        *seeds(lab, "pgd-at", [0.60, 0.61]),
        *seeds(lab, "adaptive-tau1", [0.71, 0.75]),
        *seeds(lab, "adaptive-cold-longer", [0.8]),
        *seeds(lab, "adaptive-cold", [0.6]),
        *seeds(lab, "pgd-at-lr0.03", [0.5, 0.51], natural=0.1),
        *seeds(lab, "adaptive-ema", [0.5], dataset="mnist5k", eps=0.3),
    ]
    _, *lines = cells(lab.tables.search_table(records, "digits"))
    about = {method: lab.runs.METHODS[method].about for method in lab.runs.SEARCH}
    at, cold, tau1 = lines
    assert at[:2] == ["pgd-at-lr0.03 (collapsed)", about["pgd-at-lr0.03"]]
    assert at[4:] == ["pgd-at", "−80.0", "−10.0", "+5.0", "2"]
    assert cold[0] == "adaptive-cold-longer"
    assert cold[4:7] == ["adaptive-cold", "0.0", "+20.0"]
    assert tau1[:2] == ["adaptive-tau1", about["adaptive-tau1"]]
    assert tau1[2:] == ["90.1 ± 0.1", "73.0 ± 2.8", "adaptive", "0.0", "+2.0", "+5.0", "2"]
    assert cells(lab.tables.search_table(records, "mnist5k"))[1][4:7] == ["adaptive", "-", "-"]
    assert lab.tables.search_table(records[:3], "digits") == ""


def test_agreement_names_the_methods_with_other_numbers(lab) -> None:
    there = [*seeds(lab, "ramp", [0.70, 0.72]), *seeds(lab, "pgd-at", [0.6]), *seeds(lab, "literal", [0.1])]
    assert lab.tables.agreement(there[:3], there, "digits", 0.2).startswith("All 3 runs that docs/study.md has too")
    here = [replace(run, apgd=run.apgd + 0.01) if run.method == "ramp" else run for run in there]
    apart = [replace(run, apgd=run.apgd + gap) for run, gap in zip(there, (0.01, 0.03), strict=False)]
    *_, line = cells(lab.tables.agreement(apart, there, "digits", 0.2))
    # t of one degree of freedom is 25.45 at 1 - 0.05 / 4 (two cells): times the standard error of 1 and 3, which is 1.
    assert line[2] == "+2.0 [−23.5, +27.5]"
    other = replace(here[-1], apgd=0.5, epochs=3)  # of other epochs: no repetition
    _, *lines = cells(lab.tables.agreement([*here[:-1], other], there, "digits", 0.2))
    assert lines == [["ramp", "0.0", "+1.0", "2"]]
    assert lab.tables.agreement([other], there, "digits", 0.2) == ""
    assert lab.tables.agreement(here, [], "digits", 0.2) == ""


def test_methods_are_explained(lab) -> None:
    records = [made_up(lab, method) for method in ("adaptive-one-hot", "clean", "ramp-tau2", "adaptive-tau1")]
    _, *lines = cells(lab.tables.methods_table(records))
    assert lines == [
        ["clean", lab.runs.METHODS["clean"].about, "-"],
        ["adaptive-one-hot", lab.runs.METHODS["adaptive-one-hot"].about, "`--recipe ours`, `one_hot = True`"],
    ]
    assert lab.tables.markdown(["a|b"], [["c"]]) == "| a\\|b |\n| --- |\n| c |\n"


def test_the_final_read_has_only_what_was_read(lab) -> None:
    read = {"test_natural": 0.8, "test_pgd20": 0.7, "test_apgd": 0.6}
    ours = seeds(lab, "ramp", [0.9, 0.9, 0.9], **read, test_autoattack=0.5, test_autoattack_images=200)
    ours[2] = replace(ours[2], test_autoattack=None, test_autoattack_images=None)
    records = [*ours, *seeds(lab, "pgd-at", [0.9])]
    head, line = cells(lab.tables.test_table(records, "digits", 0.2))
    assert head == [
        "method", "natural, test", "PGD-20, test", "APGD, test", "AutoAttack, first 200 test", "seeds",
    ]  # fmt: skip
    assert line == ["ramp", "80.0 ± 0.0", "70.0 ± 0.0", "60.0 ± 0.0", "50.0 ± 0.0 (n = 2)", "3"]
    assert lab.tables.test_table(records[3:], "digits", 0.2) == ""
    records += [made_up(lab, method, **read) for method in ("adaptive-tau1", "pgd-at-warm")]
    assert [line[0] for line in cells(lab.tables.test_table(records, "digits", 0.2))[1:]] == [
        "ramp", "pgd-at-warm", "adaptive-tau1",
    ]  # fmt: skip


def test_claims(lab) -> None:
    def read(method: str, values: list[float], images: int = 200) -> list:
        return [
            made_up(lab, method, seed, test_autoattack=value, test_autoattack_images=images)
            for seed, value in enumerate(values)
        ]

    claim = lab.claims.Claim("digits", 0.2, "ramp", "pgd-at", "test_autoattack", 5)
    back = replace(claim, better="pgd-at", worse="ramp")
    never = replace(claim, measure="test_natural")
    records = [*read("ramp", [0.61, 0.72, 0.83, 0.94, 1.0]), *read("pgd-at", [0.6, 0.7, 0.8, 0.9, 0.95])]
    _, *lines = cells(lab.tables.claims_table(records, [claim]))
    of = "AutoAttack, first 200 test"
    assert lines == [["digits, eps 0.2", "ramp > pgd-at", of, "**+3.0 [+1.0, +5.0]**", "yes", "5"]]
    # Seeds beyond those that were meant do not count, and with fewer there is no verdict yet.
    more = [replace(record, seed=5, test_autoattack=record.test_autoattack / 2) for record in records[:1]]
    assert cells(lab.tables.claims_table([*records, *more, *read("pgd-at", [1.0] * 6)[5:]], [claim]))[1] == lines[0]
    fewer = [*records[:4], *records[5:]]
    assert lab.tables.claims_table(fewer, [claim]) == ""
    assert cells(lab.tables.claims_table(fewer, [claim, replace(claim, seeds=4)]))[1][3:] == ["-", "-", "4 of 5"]
    # Accuracies on other images are no pairs.
    assert lab.tables.claims_table([*records[:5], *read("pgd-at", [0.6, 0.7, 0.8, 0.9, 0.95], 100)], [claim]) == ""
    # All count in the correction: of three, t at 1 - 0.05 / 6 is 3.961, and the half width 2.80.
    _, *lines = cells(lab.tables.claims_table(records, [claim, back, never]))
    assert [line[3:] for line in lines] == [
        ["**+3.0 [+0.2, +5.8]**", "yes", "5"],
        ["**−3.0 [−5.8, −0.2]**", "no", "5"],
        ["-", "-", "0 of 5"],
    ]
    # Of thirty, t at 1 - 0.05 / 60 is 7.3: an interval with 0 in it shows nothing either way.
    assert cells(lab.tables.claims_table(records, [claim] * 30))[1][4] == "not shown"
    assert lab.tables.claims_table(records, [claim]).endswith(" |\n\n95 % for the interval.\n")
    assert lab.tables.claims_table(records, [never]) == ""
    assert lab.tables.claims_table(records, []) == ""
    assert {*lab.claims.MEASURES} < {field.name for field in fields(lab.records.Record)}
    wrong = {"measure": "natural", "dataset": "digit", "better": "adaptiv", "worse": "x"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"{name} must be one of .*; got '{value}'"):
            replace(claim, **{name: value})


def test_readme_adds_the_test_images_once_they_are_read(lab) -> None:
    claims = [
        lab.claims.Claim("digits", 0.2, "ramp", "pgd-at", "test_autoattack", 1),
        lab.claims.Claim("mnist5k", 0.3, "ramp", "pgd-at", "test_apgd", 1),
    ]
    digits = [*seeds(lab, "ramp", [0.7, 0.7]), *seeds(lab, "pgd-at", [0.6]), *seeds(lab, "pgd-at-warm", [0.5])]
    mnist = seeds(lab, "ramp", [0.5], dataset="mnist5k", eps=0.3)
    head, *lines = cells(lab.tables.compact_table([*digits, *mnist], claims))
    assert head[1:3] == ["digits, eps 0.2, natural, validation", "digits, eps 0.2, APGD, validation"]
    assert head[3:] == ["mnist5k, eps 0.3, natural, validation", "mnist5k, eps 0.3, APGD, validation", "seeds"]
    assert lines == [
        ["pgd-at", "90.0", "60.0", "-", "-", "1 / 0"],
        ["ramp", "90.1 ± 0.1", "70.0 ± 0.0", "90.0", "50.0", "2 / 1"],
    ]
    digits[0] = replace(digits[0], natural=0.1, test_natural=0.8, test_autoattack=0.4, test_autoattack_images=200)
    head, *lines = cells(lab.tables.compact_table([*digits, *mnist], claims))
    assert head[3:5] == ["digits, eps 0.2, AutoAttack, first 200 test", "mnist5k, eps 0.3, natural, validation"]
    assert lines == [
        ["pgd-at", "90.0", "60.0", "-", "-", "-", "1 / 0"],
        ["ramp", "50.1 ± 56.7 (1 of 2 collapsed)", "70.0 ± 0.0", "40.0 (n = 1)", "90.0", "50.0", "2 / 1"],
    ]
    assert lab.tables.compact_table([], claims) == ""


# Files.


def test_only_the_named_block_changes(lab, tmp_path) -> None:
    path = tmp_path / "a.md"
    path.write_text("é <!-- begin: a -->\nold\n<!-- end: a --> <!-- begin: b -->b<!-- end: b --> z\n", encoding="utf-8")
    lab.tables.write_blocks(path, {"a": "| \\1 |\n"})
    once = "é <!-- begin: a -->\n\n| \\1 |\n\n<!-- end: a --> <!-- begin: b -->b<!-- end: b --> z\n"
    assert path.read_text(encoding="utf-8") == once
    lab.tables.write_blocks(path, {"a": "| \\1 |\n"})
    assert path.read_text(encoding="utf-8") == once
    with pytest.raises(ValueError, match=r"a\.md: .* <!-- begin: c --> and <!-- end: c -->"):
        lab.tables.write_blocks(path, {"a": "new", "c": "new"})
    assert path.read_text(encoding="utf-8") == once


BEGIN, END = "<!-- begin: a -->", "<!-- end: a -->"


@pytest.mark.parametrize("text", [BEGIN, END, END + BEGIN, 2 * (BEGIN + END)])
def test_markers_must_be_there_once_and_in_order(lab, text) -> None:
    with pytest.raises(ValueError, match="must have the markers"):
        lab.tables.replaced(text, "a", "new")


def test_a_csv_holds_what_was_written(lab, tmp_path) -> None:
    path = tmp_path / "runs.csv"
    records = [made_up(lab, "ramp", 0, transfer=0.5), made_up(lab, "clean", 1, options="--a 1, 2 | one_hot")]
    lab.records.write(path, records, lab.records.Record)
    assert lab.records.read_runs(path) == sorted(records, key=lambda record: record.method)
    epochs = [made_up_epoch(lab, "ramp", 0, 0, 0.5, 0.25)]
    lab.records.write(tmp_path / "curves.csv", epochs, lab.records.Epoch)
    assert lab.records.read_curves(tmp_path / "curves.csv") == epochs
    assert epochs[0].guidance is None
    with pytest.raises(ValueError, match=r"runs\.csv must have the columns dataset, .*epoch, .*; got dataset, "):
        lab.records.read_curves(path)


def test_the_examples_leave_no_trace() -> None:
    """Not the package's modules either: a test's own import of the same name must not find them."""
    before = {*sys.modules}
    with imported("lab.statistics") as modules:
        assert "lab.records" in sys.modules
        assert Path(modules.statistics.__file__).parent == EXAMPLES / "lab"
    assert not {name for name in {*sys.modules} - before if name.partition(".")[0] in ("lab", "checkpoint")}


# Figures.


def lines_of(axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def test_sweeps_show_means_bands_and_seeds(lab) -> None:
    records = [
        *seeds(lab, "ramp", [0.70, 0.74]),
        *seeds(lab, "ramp-tau2", [0.60, 0.64]),
        *seeds(lab, "ramp-beta0", [0.50, 0.54]),
        *seeds(lab, "ramp-beta1", [0.4]),
    ]
    tau, beta = lab.figures.sweeps(records).axes
    assert lines_of(tau, "under APGD") == ([2, 5], pytest.approx([0.62, 0.72]))
    assert lines_of(beta, "under APGD") == ([0, 1, 6], pytest.approx([0.52, 0.4, 0.72]))
    assert lines_of(beta, "natural") == ([0, 1, 6], pytest.approx([0.901, 0.9, 0.901]))
    _, _, band, dots = beta.collections
    assert dots.get_offsets().tolist() == [[0, 0.5], [0, 0.54], [1, 0.4], [6, 0.7], [6, 0.74]]
    heights = {y for x, y in band.get_paths()[0].vertices.tolist() if x == 0}
    assert sorted(heights) == pytest.approx([0.52 - 0.0282843, 0.52 + 0.0282843], abs=1e-6)
    assert lab.figures.sweeps(records[:4]) is None


def test_trade_off_says_which_images(lab) -> None:
    read = {"test_natural": 0.8, "test_autoattack": 0.4, "test_autoattack_images": 200}
    methods = [method for method in (*lab.runs.MAIN, *lab.runs.CONTROLS) if method not in ("clean", "literal")]
    digits = [
        record
        for i, method in enumerate(methods)
        for record in seeds(lab, method, [0.70 + i / 500, 0.71 + i / 500], natural=0.98 + i / 5000)
    ]
    digits += seeds(lab, "literal", [0.1, 0.1], natural=0.1) + seeds(lab, "clean", [0.0])
    mnist = seeds(lab, "ramp", [0.5], dataset="mnist5k", eps=0.3, **read)
    mnist += seeds(lab, "adaptive", [0.5, 0.5], dataset="mnist5k", eps=0.3)
    claims = [lab.claims.Claim("mnist5k", 0.3, "ramp", "pgd-at", "test_autoattack", 1)]
    left, right = lab.figures.trade_off([*digits, *mnist], claims).axes
    assert left.get_ylabel() == "accuracy: APGD, validation images"
    assert left.get_xlabel() == "accuracy: natural, validation images"
    assert right.get_ylabel() == "accuracy: AutoAttack, first 200 test images"
    assert right.get_xlabel() == "accuracy: natural, test images"
    shown = {bar.get_label(): bar.lines[0].get_xydata()[0].tolist() for bar in left.containers}
    assert list(shown) == methods  # without those at chance, which would squeeze them
    assert shown["pgd-at"] == pytest.approx([0.981, 0.705])
    assert [bar.get_label() for bar in right.containers] == ["ramp"]  # the only one that was read
    assert right.containers[0].lines[0].get_xydata().tolist() == [[0.8, 0.4]]
    assert "Not shown: clean 90.0 / 0.0, literal 10.1 / 10.0" in [text.get_text() for text in left.texts]
    other = [replace(claims[0], measure="test_apgd"), *claims]
    mnist[0] = replace(mnist[0], test_apgd=0.6)
    assert lab.figures.trade_off(mnist, other).axes[0].get_ylabel() == "accuracy: APGD, test images"
    assert lab.figures.trade_off([], claims) is None


def test_labels_do_not_overlap(lab) -> None:
    """Of methods whose points nearly touch, since another is far away."""
    methods = [*lab.runs.MAIN, *lab.runs.CONTROLS]
    records = [made_up(lab, method, 0, 0.98 + i / 5000, 0.7 + i / 500) for i, method in enumerate(methods)]
    records[2] = replace(records[2], natural=0.8, apgd=0.4)
    figure = lab.figures.trade_off(records, [])
    renderer = figure.canvas.get_renderer()
    panel = figure.axes[0]
    boxes = {}
    for text in panel.texts:
        # The extent of an annotation takes its arrow in; of the text alone it is that of a text like it.
        x, y = panel.transData.transform(text.xy) + [offset * figure.dpi / 72 for offset in text.get_position()]
        alone = panel.text(0, 0, text.get_text(), size=9).get_window_extent(renderer)
        boxes[text.get_text()] = (x - alone.width / 2, y - alone.height / 2, x + alone.width / 2, y + alone.height / 2)
    assert list(boxes) == methods
    apart = [
        a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        for i, a in enumerate(boxes.values())
        for b in list(boxes.values())[:i]
    ]
    assert all(apart)


def test_collapse_and_rescue(lab) -> None:
    curves = curves_of(lab, "literal", "adaptive", "ramp")
    left, right = lab.figures.collapse_and_rescue(curves, "digits", 0.2).axes
    assert left.get_title("left").startswith("literal:")
    assert right.get_title("left").startswith("adaptive:")
    epochs, clean = lines_of(left, "clean")
    assert epochs == list(range(11))
    assert clean == pytest.approx([0.51 + epoch / 100 for epoch in epochs])
    assert lines_of(left, "under PGD-10")[1] == pytest.approx([0.31] * 11)
    thin = [line.get_ydata()[0] for line in left.lines if line.get_linewidth() < 1]
    assert thin == pytest.approx([0.5, 0.52, 0.3, 0.32])
    titles = lab.figures.collapse_and_rescue(curves, "digits", 0.2, "ramp", "literal").axes
    assert [axes.get_title("left").split(":")[0] for axes in titles] == ["ramp", "literal"]
    assert lab.figures.collapse_and_rescue(curves, "digits", 0.12) is None


def test_errors_per_epoch(lab) -> None:
    curves = curves_of(lab, "adaptive", "pgd-at", "pgd-at-warm")
    stopped = [row for row in curves if row.seed == 0 or row.epoch < 5]
    natural, robust = lab.figures.errors_per_epoch(stopped, "digits", 0.2).axes
    labels = [line.get_label() for line in robust.lines if not line.get_label().startswith("_")]
    assert labels == ["pgd-at", "adaptive"]
    epochs, errors = lines_of(natural, "pgd-at")
    assert epochs == list(range(5))  # of both seeds
    assert errors == pytest.approx([0.49 - epoch / 100 for epoch in range(5)])
    assert lines_of(robust, "adaptive")[1] == pytest.approx([0.69] * 5)
    colors = {line.get_color() for line in robust.lines}
    assert len(colors) == 2
    assert lab.figures.errors_per_epoch(curves, "mnist5k", 0.3) is None


def test_weights_are_percentiles_over_epochs(lab) -> None:
    left, right = lab.figures.weights(curves_of(lab, "ramp", "adaptive"), "digits", 0.2).axes
    assert (left.get_title("left")[:8], right.get_title("left")[:4]) == ("adaptive", "ramp")
    epochs, median = lines_of(left, "median")
    assert median == pytest.approx([0.505 + epoch / 1000 for epoch in epochs])
    for band, (low, high) in zip(left.collections, [(0.055, 0.955), (0.255, 0.755)], strict=True):
        heights = sorted({round(y, 6) for x, y in band.get_paths()[0].vertices.tolist() if x == 10})
        assert heights == pytest.approx([low + 0.01, high + 0.01])
    assert lab.figures.weights(curves_of(lab, "ramp"), "digits", 0.2) is None


# All of it.


@pytest.fixture
def files(lab, tmp_path):
    """CSVs of made-up runs, and the documentation as it is in the repository."""
    grid = lab.runs.grid("full", "digits", None, 2)
    records = [
        made_up(lab, run.method, run.seed, 0.9, 0.5 + 0.01 * run.seed, arch=run.arch, eps=run.eps) for run in grid
    ]
    lab.records.write(tmp_path / "runs.csv", records, lab.records.Record)
    curves = curves_of(lab, "literal", "adaptive", "ramp")
    lab.records.write(tmp_path / "curves.csv", curves, lab.records.Epoch)
    (tmp_path / "study.md").write_text(lab.report.STUDY.read_text())
    (tmp_path / "README.md").write_text(lab.report.README.read_text())
    return tmp_path


def write(lab, files: Path, folder: str = "figures") -> list[str]:
    both = {"study": files / "study.md", "readme": files / "README.md"}
    written = lab.report.report(files / "runs.csv", files / "curves.csv", files / folder, **both)
    return [str(path.relative_to(files)) for path in written]


def test_report_writes_what_there_is_data_for(lab, files) -> None:
    pictures = ["sweeps", "trade_off", "collapse_and_rescue-digits", "errors_per_epoch-digits", "weights-digits"]
    assert write(lab, files) == [*(f"figures/{name}.png" for name in pictures), "study.md", "README.md"]
    for name in pictures:
        height, width, _ = image.imread(files / "figures" / f"{name}.png").shape
        assert min(height, width) > 400
    blocks = lab.report.study_blocks(lab.records.read_runs(files / "runs.csv"))
    assert [name for name, text in blocks.items() if text.startswith("Not run")] == [
        "main-mnist5k", "main-cifar10", "test", "claims",
    ]  # fmt: skip
    study = (files / "study.md").read_text()
    for name, text in blocks.items():
        body = f"\n{text.strip()}\n\n" if text else ""
        assert f"<!-- begin: {name} -->\n{body}<!-- end: {name} -->" in study
    assert "\n300 validation images; 15 epochs, split seed 2026; cpu, torch 2.14.1, Python 3.11.7" in study
    assert "eps 0.2:\n\n| method |" in study
    assert "eps 0.12:\n\n| method |" in study
    assert "<!-- begin: main-mnist5k -->" in study
    readme = (files / "README.md").read_text()
    assert "| pgd-at | 90.0 ± 0.0 | 50.5 ± 0.7 | 2 |" in readme
    before, after = (re.split("<!-- begin: study -->.*<!-- end: study -->", text, flags=re.DOTALL)
                     for text in (lab.report.README.read_text(), readme))  # fmt: skip
    assert len(before) == 2
    assert before == after


def test_the_same_records_give_the_same_bytes(lab, files) -> None:
    write(lab, files, "a")
    texts = [(files / name).read_bytes() for name in ("study.md", "README.md")]
    write(lab, files, "b")
    assert texts == [(files / name).read_bytes() for name in ("study.md", "README.md")]
    for picture in (files / "a").iterdir():
        content = picture.read_bytes()
        assert content == (files / "b" / picture.name).read_bytes()
        assert b"Software" not in content
        assert b"tIME" not in content


def test_what_a_new_csv_lacks_does_not_keep_its_old_numbers(lab, files) -> None:
    write(lab, files)
    lab.records.write(files / "runs.csv", [made_up(lab, "pgd-at", natural=0.823)], lab.records.Record)
    lab.records.write(files / "curves.csv", [], lab.records.Epoch)
    assert write(lab, files) == ["figures/trade_off.png", "study.md", "README.md"]
    study = (files / "study.md").read_text()
    assert "| pgd-at | 82.3 |" in study
    assert study.count("Not run yet.") == 8  # ablation, tau, beta, capacity, test, claims, two data sets
    assert "<!-- begin: differences-digits -->\n<!-- end" in study
    (files / "runs.csv").unlink()
    with pytest.raises(FileNotFoundError):
        write(lab, files)
    assert (files / "study.md").read_text() == study


def test_the_skeleton_has_all_blocks(lab) -> None:
    """Of every data set, and of the test images too, so that a report of new runs finds its markers."""
    read = {"test_natural": 0.8, "test_pgd20": 0.7, "test_apgd": 0.6, "test_autoattack": 0.5}
    records = [
        made_up(lab, run.method, run.seed, dataset=run.dataset, arch=run.arch, eps=run.eps, **read)
        for dataset in lab.runs.SETTINGS
        for run in lab.runs.grid("full", dataset, None, 2)
    ]
    claims = [lab.claims.Claim("digits", 0.2, "adaptive", "pgd-at", "test_autoattack", 2)]
    blocks = lab.report.study_blocks(records, claims)
    assert len(blocks) == 19
    assert all(blocks.values())
    text = lab.report.STUDY.read_text()
    for name, content in blocks.items():
        text = lab.tables.replaced(text, name, content)
    assert "eps 8/255:" in text
    assert "Not run yet" not in text
