"""The study's report: statistics by hand, tables and figures of made-up runs, and files of which only blocks change."""

# ruff: noqa: E402 (what is tested needs packages that may be missing)

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

image = pytest.importorskip("matplotlib.image")
pd = pytest.importorskip("pandas")
for package in ("scipy", "tyro"):
    pytest.importorskip(package)

from benchmarks import markdown
from benchmarks.study import claims, figures, grid, records, replication, report, tables
from benchmarks.study.cells import difference
from benchmarks.study.paired import interval, paired_differences

with_data = pytest.mark.skipif(
    not (report.RESULTS / "runs.csv").exists(), reason="the source distribution leaves the study's data out"
)


def run(method: str, seed: int = 0, natural: float = 0.9, apgd: float = 0.7, **other) -> dict:
    """A row of runs.csv; PGD-20 is 5 points above APGD, CW-30 2 points."""
    return {
        "dataset": "digits", "arch": "digits", "method": method, "options": "", "eps": 0.2, "seed": seed,
        "split_seed": 2026, "epochs": 15, "natural": natural, "pgd20": apgd + 0.05, "cw30": apgd + 0.02, "apgd": apgd,
        "apgd_ce": apgd + 0.01, "zero_gradients": 0.25, "nonlinearity": 0.1, "confidence": 0.8, "train_seconds": 12.5,
        "measure_seconds": 3.0, "device": "cpu", "python": "3.11.7", "torch": "2.14.1", "cktat_loss": "0.1.0",
        "date": "2026-11-23",
    } | other  # fmt: skip


def seeds(method: str, apgd: list[float], natural: float = 0.9, **other) -> list[dict]:
    return [run(method, seed, natural + seed / 500, value, **other) for seed, value in enumerate(apgd)]


def runs(*rows: dict) -> "pd.DataFrame":
    return records.frame(rows, records.RUN)


def curves(*methods: str) -> "pd.DataFrame":
    """Two seeds of 11 epochs: clean accuracy 0.5 + epoch / 100, and PGD accuracy 0.3; the second seed 0.02 above."""
    rows = [
        {
            "dataset": "digits", "arch": "digits", "method": method, "eps": 0.2, "seed": seed, "epoch": epoch,
            "clean_accuracy": 0.5 + epoch / 100 + seed / 50, "pgd_accuracy": 0.3 + seed / 50, "consistency": 0.25,
            **{f"label_probability_p{p:02}": (p + seed) / 100 + epoch / 1000 for p in (5, 25, 50, 75, 95)},
        }
        for method in methods for seed in (0, 1) for epoch in range(11)
    ]  # fmt: skip
    return records.frame(rows, records.EPOCH)


def lines(table: str) -> list[list[str]]:
    """A table's lines without the rule below the head."""
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line[:1] == "|"]
    return found[:1] + found[2:]


# Statistics.


def test_interval_by_hand() -> None:
    """t with 4 degrees of freedom: 2.776445 at 0.975, 4.604095 at 0.995, which is 5 comparisons."""
    for comparisons, t, clear in ((1, 2.776445, True), (5, 4.604095, False)):
        found, half = interval([1, 2, 3, 4, 5], comparisons), t * math.sqrt(2.5) / math.sqrt(5)
        assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)
        assert difference(found).startswith("**") is clear


@pytest.mark.parametrize(
    "differences", [[2.0], [2.0, 2.0, 2.0], [100 * (0.976667 - 0.973333), 100 * (0.98 - 0.976667)]]
)
def test_no_interval_without_spread(differences) -> None:
    """One seed tells nothing about spread; several with the same difference are no certainty either.

    The last are one image of 300 each, as a CSV rounds accuracies.
    """
    found = interval(differences)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.mean == pytest.approx(differences[0], abs=1e-3)
    assert "[" not in difference(found)


def test_pairs_share_all_but_the_method() -> None:
    ours, theirs = seeds("ramp", [0.70, 0.75, 0.80]), seeds("pgd-at", [0.60, 0.70, 0.71, 0.1])
    unpaired = [ours[0] | {"seed": 7}, ours[0] | {"seed": 8, "apgd": None}, theirs[0] | {"seed": 8}]
    other = [ours[0] | {"seed": 3, "eps": 0.12}, ours[0] | {"seed": 3, "arch": "digits-4"}, run("trades", 3)]
    table = runs(*theirs, *reversed(ours), *unpaired, *other)
    ramp, pgd_at = (table[table["method"] == method] for method in ("ramp", "pgd-at"))
    assert [*paired_differences(ramp, pgd_at, "apgd")] == pytest.approx([10, 5, 9])
    assert [*paired_differences(pgd_at, ramp, "apgd")] == pytest.approx([-10, -5, -9])
    assert paired_differences(ramp, pgd_at, "test_apgd").empty
    twice = runs(*ours, ours[0])
    for sides in ((twice, pgd_at), (pgd_at, twice)):
        with pytest.raises(
            ValueError, match=r"got two of ramp with dataset digits, split_seed 2026, arch digits, eps 0\.2, seed 0"
        ):
            paired_differences(*sides, "apgd")


# Records.


@with_data
@pytest.mark.parametrize(
    ("name", "columns"),
    [("runs", records.RUN), ("curves", records.EPOCH), ("runs-0.2", records.RUN), ("replication", records.REPLICATION)],
)
def test_the_committed_csvs_are_read_without_loss(tmp_path, name, columns) -> None:
    path = report.RESULTS / f"{name}.csv"
    records.write(tmp_path / "again.csv", records.read(path, columns))
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match=rf"{name}\.csv must have the columns dataset, .*; got dataset, "):
        records.read(path, {**columns, "more": str})


@with_data
def test_the_first_study_is_that_of_0_1_0() -> None:
    found = report.load()
    assert {*found.runs["cktat_loss"]} == {"0.1.0"}
    assert (len(found.runs), len(found.replication)) == (503, 143)


def test_a_radius_from_a_csv_is_the_settings_one(tmp_path) -> None:
    """8/255 is written with six digits."""
    before = runs(run("ramp", dataset="cifar10", arch="resnet18", eps=8 / 255))
    records.write(tmp_path / "runs.csv", before)
    after = records.read(tmp_path / "runs.csv", records.RUN)
    assert len(records.select(after, "cifar10", 8 / 255)) == 1
    assert len(records.select(after, "cifar10", 4 / 255)) == 0
    theirs = before.assign(method="pgd-at", apgd=0.5)
    assert [*paired_differences(after, theirs, "apgd")] == pytest.approx([20])


# Tables.


def test_main_table() -> None:
    table = runs(
        *seeds("adaptive", [0.70, 0.72, 0.74], transfer=0.9),
        *seeds("pgd-at", [0.7]),
        *seeds("pgd-at-warm", [0.5, 0.5]),
        *seeds("literal", [0.1, 0.1], natural=0.1),
        *seeds("detach", [0.1, 0.1], natural=0.1995),  # one below 20 %, one above
        *seeds("adaptive", [0.1], eps=0.12),
        *seeds("ramp", [0.1], dataset="mnist5k"),
        *seeds("ramp", [0.1], arch="digits-4"),
    )
    head, *rest = lines(tables.main_table(table, "digits", 0.2))
    found = {line[0]: dict(zip(head, line, strict=True)) for line in rest}
    assert list(found) == ["pgd-at", "literal (collapsed)", "detach (1 of 2 collapsed)", "adaptive", "pgd-at-warm"]
    assert found["adaptive"] == {
        "method": "adaptive", "natural": "90.2 ± 0.2", "PGD-20": "77.0 ± 2.0", "APGD": "72.0 ± 2.0",
        "PGD-20 − APGD": "+5.0", "CW-30 − APGD": "+2.0", "transfer − APGD": "+18.0", "zero gradients, %": "25.0",
        "seeds": "3",
    }  # fmt: skip
    assert [found["pgd-at"][name] for name in ("APGD", "transfer − APGD", "seeds")] == ["70.0", "-", "1"]
    assert tables.main_table(table, "cifar10", 8 / 255) == ""


def test_differences_are_corrected_for_all_that_are_shown_and_bold_where_clear() -> None:
    base = [0.70, 0.71, 0.72, 0.73, 0.74]
    ours = [apgd + gain for apgd, gain in zip(base, [0.01, 0.02, 0.03, 0.04, 0.05], strict=True)]
    rows = [*seeds("pgd-at", base), *seeds("ramp", ours), *seeds("clean", [0.0])]

    def table(*more: dict) -> str:
        return tables.difference_table(runs(*rows, *more), "digits", 0.2)

    # Two are shown; t with 4 degrees of freedom at 1 - 0.05 / 4 is 3.495406, and the half width 2.47.
    assert lines(table())[1:] == [["ramp", "0.0", "**+3.0 [+0.5, +5.5]**", "5"]]
    assert table().splitlines()[-1] == "95 % for all 2 intervals together, by Bonferroni's correction."
    assert lines(table(*seeds("adaptive", [0.9])))[-1] == ["adaptive", "0.0", "+20.0", "1"]
    # With two more methods six are shown: 4.851 half widths of 0.707 no longer leave out 0.
    assert lines(table(*seeds("trades", ours), *seeds("adaptive", ours[::-1])))[2][2].startswith("+3.0 [−")
    swap = {"ramp": "pgd-at", "pgd-at": "ramp"}
    worse = runs(*(row | {"method": swap[row["method"]]} for row in rows[:10]))
    assert lines(tables.difference_table(worse, "digits", 0.2))[1][2] == "**−3.0 [−5.5, −0.5]**"
    assert tables.difference_table(runs(*rows[5:]), "digits", 0.2) == ""


def test_sweeps_and_parts_show_what_is_missing() -> None:
    table = runs(*seeds("ramp", [0.7]), *seeds("ramp-tau2", [0.6, 0.6]), *seeds("ramp-cold", [0.5]))
    _, *taus = lines(tables.paper_table(table, grid.TAU_SWEEP, "tau"))
    assert [line[0] for line in taus] == ["1", "2", "3", "4", "5", "6"]
    assert taus[0] == ["1", "-", "-", "-", "0"]
    assert taus[1][2:] == ["65.0 ± 0.0", "60.0 ± 0.0", "2"]
    assert taus[4][2:] == ["75.0", "70.0", "1"]
    assert tables.paper_table(table, grid.BETA_SWEEP, "beta") == ""  # ramp alone is no sweep
    ablation = tables.paper_table(table, {name: name for name in grid.ABLATION}, "method")
    assert [(line[0], line[-1]) for line in lines(ablation)[1:]] == [
        ("ramp", "1"), ("ramp-cold", "1"), ("ramp-no-guidance", "0"), ("ramp-beta0", "0"),
    ]  # fmt: skip


def test_capacity_has_a_column_a_width() -> None:
    table = runs(
        *seeds("ramp", [0.7, 0.8], arch="digits-4"),
        *seeds("ramp", [0.7]),
        *seeds("teacher-only", [0.1], arch="digits-32"),
        *seeds("pgd-at", [0.6]),
        *seeds("pgd-at", [0.1], natural=0.1, arch="digits-32"),
    )
    head, *rest = lines(tables.capacity_table(table, "digits", 0.2))
    assert [cell.split(":")[0] for cell in head[1:4]] == ["width 4", "width 16", "width 32"]
    assert rest == [
        ["pgd-at", "-", "90.0 / 60.0", "10.0 / 10.0 (collapsed)", "0 / 1 / 1"],
        ["ramp", "90.1 ± 0.1 / 75.0 ± 7.1", "90.0 / 70.0", "-", "2 / 1 / 0"],
    ]


def test_a_search_is_measured_against_what_it_changed() -> None:
    table = runs(
        *seeds("adaptive", [0.70, 0.72, 0.99]),
        *seeds("pgd-at", [0.60, 0.61]),
        *seeds("adaptive-tau1", [0.71, 0.75]),
        *seeds("adaptive-cold-longer", [0.8]),
        *seeds("adaptive-cold", [0.6]),
        *seeds("pgd-at-lr0.03", [0.5, 0.51], natural=0.1),
        *seeds("adaptive-ema", [0.5], dataset="mnist5k", eps=0.3),
    )
    at, cold, tau1 = lines(tables.search_table(table, "digits"))[1:]
    assert at[:2] == ["pgd-at-lr0.03 (collapsed)", grid.METHODS["pgd-at-lr0.03"].about]
    assert at[4:] == ["pgd-at", "−80.0", "−10.0", "+5.0", "2"]
    assert (cold[0], *cold[4:7]) == ("adaptive-cold-longer", "adaptive-cold", "0.0", "+20.0")
    assert tau1[2:] == ["90.1 ± 0.1", "73.0 ± 2.8", "adaptive", "0.0", "+2.0", "+5.0", "2"]
    assert lines(tables.search_table(table, "mnist5k"))[1][4:7] == ["adaptive", "-", "-"]


def test_agreement_is_of_the_same_runs_alone() -> None:
    there = [*seeds("ramp", [0.70, 0.72]), *seeds("pgd-at", [0.6]), *seeds("literal", [0.1])]
    other = there[3] | {"apgd": 0.5, "epochs": 3}  # of other epochs: no repetition
    here = [there[0] | {"apgd": 0.71}, there[1] | {"apgd": 0.75}, there[2], other]
    table = tables.agreement_table(runs(*here), runs(*there), "digits", 0.2)
    # t of one degree of freedom is 25.45 at 1 - 0.05 / 4 (two cells): times the standard error of 1 and 3, which is 1.
    assert lines(table) == [
        ["less 0.1.0", "natural", "APGD", "pairs"],
        ["pgd-at", "0.0", "0.0", "1"],
        ["ramp", "0.0", "+2.0 [−23.5, +27.5]", "2"],
    ]
    assert tables.agreement_table(runs(other), runs(*there), "digits", 0.2) == ""


def test_methods_are_explained() -> None:
    table = runs(*(run(method) for method in ("adaptive-one-hot", "clean", "ramp-tau2", "adaptive-tau1")))
    assert lines(tables.methods_table(table))[1:] == [
        ["clean", grid.METHODS["clean"].about, "`--method clean`"],
        ["adaptive-one-hot", grid.METHODS["adaptive-one-hot"].about, "`--recipe adaptive`, `one_hot = True`"],
    ]


def test_the_final_read_has_only_what_was_read() -> None:
    read = {"test_natural": 0.8, "test_pgd20": 0.7, "test_apgd": 0.6}
    ours = seeds("ramp", [0.9, 0.9, 0.9], **read, test_autoattack=0.5, test_autoattack_images=200)
    ours[2] |= {"test_autoattack": None, "test_autoattack_images": None}
    unread = seeds("pgd-at", [0.9])
    head, *rest = lines(tables.test_table(runs(*ours, *unread), "digits", 0.2))
    assert head == ["method", "natural, test", "PGD-20, test", "APGD, test", "AutoAttack, first 200 test", "seeds"]
    assert rest == [["ramp", "80.0 ± 0.0", "70.0 ± 0.0", "60.0 ± 0.0", "50.0 ± 0.0 (n = 2)", "3"]]
    assert tables.test_table(runs(*unread), "digits", 0.2) == ""
    more = [run(method, **read) for method in ("adaptive-tau1", "pgd-at-warm")]
    found = lines(tables.test_table(runs(*ours, *more), "digits", 0.2))
    assert [line[0] for line in found[1:]] == ["ramp", "pgd-at-warm", "adaptive-tau1"]


def test_claims() -> None:
    def read(method: str, values: list[float], images: int = 200) -> list[dict]:
        test = [{"test_autoattack": value, "test_autoattack_images": images} for value in values]
        return [run(method, seed, **of) for seed, of in enumerate(test)]

    claim = claims.Claim("digits", 0.2, "ramp", "pgd-at", "test_autoattack", range(5))
    back = replace(claim, better="pgd-at", worse="ramp")
    never = replace(claim, measure="test_natural")
    ours, theirs = read("ramp", [0.61, 0.72, 0.83, 0.94, 1.0]), read("pgd-at", [0.6, 0.7, 0.8, 0.9, 0.95])

    def table(rows: list[dict], *judged: claims.Claim, comparisons: int = 1) -> list[list[str]]:
        return lines(tables.claims_table(runs(*rows), judged, comparisons))[1:]

    of = "AutoAttack, first 200 test"
    first = ["digits, eps 0.2", "ramp > pgd-at", of, "**+3.0 [+1.0, +5.0]**", "yes", "5"]
    assert table([*ours, *theirs], claim) == [first]
    # Seeds beyond those that were meant do not count, and with fewer there is no verdict yet.
    more = [run("ramp", 5, test_autoattack=0.3, test_autoattack_images=200), *read("pgd-at", [1.0] * 6)[5:]]
    assert table([*ours, *theirs, *more], claim) == [first]
    assert table([*ours[:4], *theirs], claim) == []
    assert table([*ours[:4], *theirs], claim, replace(claim, seeds=range(4)))[0][3:] == ["-", "-", "4 of 5"]
    # Accuracies on other images are no pairs.
    assert table([*ours, *read("pgd-at", [0.6, 0.7, 0.8, 0.9, 0.95], 100)], claim) == []
    # Of three, t at 1 - 0.05 / 6 is 3.961, and the half width 2.80; of thirty, at 1 - 0.05 / 60, 7.3.
    assert [line[3:] for line in table([*ours, *theirs], claim, back, never, comparisons=3)] == [
        ["**+3.0 [+0.2, +5.8]**", "yes", "5"],
        ["**−3.0 [−5.8, −0.2]**", "no", "5"],
        ["-", "-", "0 of 5"],
    ]
    assert table([*ours, *theirs], claim, comparisons=30)[0][4] == "not shown"
    assert tables.claims_table(runs(*ours, *theirs), [claim], 1).endswith(" |\n\n95 % for the interval.\n")
    assert table([*ours, *theirs], never) == table([*ours, *theirs]) == []
    for name, value in {"measure": "natural", "dataset": "digit", "better": "adaptiv", "worse": "x"}.items():
        with pytest.raises(ValueError, match=rf"{name} must be one of .*; got '{value}'"):
            replace(claim, **{name: value})


@with_data
def test_the_second_round_is_of_seeds_that_nothing_else_was_run_with() -> None:
    found = report.load()
    before = {*found.runs["seed"], *found.replication["seed"]}
    for claim in claims.SECOND:
        assert len(claim.seeds) == 10
        assert before.isdisjoint(claim.seeds)
        other, wider = (grid.Run(claim.dataset, arch, claim.better, claim.eps, 10) for arch in ("digits", "digits-32"))
        assert claims.claimed([other, wider, replace(other, seed=0), replace(other, method="ramp")]) == [other]


def test_readme_adds_the_test_images_once_they_are_read() -> None:
    made = [
        claims.Claim("digits", 0.2, "ramp", "pgd-at", "test_autoattack", range(1)),
        claims.Claim("mnist5k", 0.3, "ramp", "pgd-at", "test_apgd", range(1)),
    ]
    digits = [*seeds("ramp", [0.7, 0.7]), *seeds("pgd-at", [0.6]), *seeds("pgd-at-warm", [0.5])]
    mnist = seeds("ramp", [0.5], dataset="mnist5k", eps=0.3)
    head, *rest = lines(tables.compact_table(runs(*digits, *mnist), made))
    assert head[1:3] == ["digits, eps 0.2, natural, validation", "digits, eps 0.2, APGD, validation"]
    assert head[3:] == ["mnist5k, eps 0.3, natural, validation", "mnist5k, eps 0.3, APGD, validation", "seeds"]
    assert rest == [
        ["pgd-at", "90.0", "60.0", "-", "-", "1 / 0"],
        ["ramp", "90.1 ± 0.1", "70.0 ± 0.0", "90.0", "50.0", "2 / 1"],
    ]
    digits[0] |= {"natural": 0.1, "test_natural": 0.8, "test_autoattack": 0.4, "test_autoattack_images": 200}
    head, *rest = lines(tables.compact_table(runs(*digits, *mnist), made))
    assert head[3:5] == ["digits, eps 0.2, AutoAttack, first 200 test", "mnist5k, eps 0.3, natural, validation"]
    assert rest == [
        ["pgd-at", "90.0", "60.0", "-", "-", "-", "1 / 0"],
        ["ramp", "50.1 ± 56.7 (1 of 2 collapsed)", "70.0 ± 0.0", "40.0 (n = 1)", "90.0", "50.0", "2 / 1"],
    ]
    assert tables.compact_table(runs(), made) == ""


def test_the_replication_pairs_each_method_with_pgd_at_and_with_itself_without_the_addition() -> None:
    def rows(method: str, apgd: list[float], natural: float = 0.9, **added: float) -> list[dict]:
        weights = {"clean_guidance": 0.0, "clean_label": 0.0} | added
        return [run(method, seed, natural, value, most_predicted=0.1, **weights) for seed, value in enumerate(apgd)]

    table = records.frame(
        [
            *rows("pgd-at", [0.60, 0.61]),
            *rows("literal", [0.1, 0.1], natural=0.45),
            *rows("adaptive", [0.70, 0.73]),
            *rows("adaptive", [0.71, 0.76], clean_guidance=1.0),
            *rows("adaptive", [0.72], clean_label=2.0),
        ],
        records.REPLICATION,
    )
    # t of one degree of freedom at 0.975 is 12.706: times the standard error of 10 and 12, which is 1; 11 and 15: 2.
    blocks = replication.replication_tables(
        table, runs(*seeds("adaptive", [0.7]), *seeds("adaptive-clean-guidance", [0.8]))
    )
    assert lines(blocks["replication-digits"])[1:] == [
        ["pgd-at", "-", "90.0 ± 0.0", "60.5 ± 0.7", "-", "-", "-", "2"],
        ["adaptive", "-", "90.0 ± 0.0", "71.5 ± 2.1", "+11.0 [−1.7, +23.7]", "-", "-", "2"],
        ["adaptive", "clean guidance 1", "90.0 ± 0.0", "73.5 ± 3.5", "+13.0 [−12.4, +38.4]", "+2.0 [−10.7, +14.7]",
         "-", "2"],
        ["adaptive", "2 CE(S(x), y)", "90.0", "72.0", "+12.0", "+2.0", "-", "1"],
        ["literal", "-", "45.0 ± 0.0", "10.0 ± 0.0", "**−50.5 [−56.9, −44.1]**", "-", "2", "2"],
    ]  # fmt: skip
    assert blocks["replication-mnist5k"] == ""
    assert [line[::2] for line in lines(blocks["replication-together"])[1:]] == [
        ["the study", "1"], ["the replication", "2"], ["both", "3"],
    ]  # fmt: skip
    assert lines(blocks["replication-together"])[1][1] == "+10.0"


# Figures.


def drawn(axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def test_sweeps_show_means_bands_and_seeds() -> None:
    rows = [
        *seeds("ramp", [0.70, 0.74]), *seeds("ramp-tau2", [0.60, 0.64]), *seeds("ramp-beta0", [0.50, 0.54]),
        *seeds("ramp-beta1", [0.4]),
    ]  # fmt: skip
    tau, beta = figures.sweeps(runs(*rows)).axes
    assert drawn(tau, "under APGD") == ([2, 5], pytest.approx([0.62, 0.72]))
    assert drawn(beta, "under APGD") == ([0, 1, 6], pytest.approx([0.52, 0.4, 0.72]))
    assert drawn(beta, "natural") == ([0, 1, 6], pytest.approx([0.901, 0.9, 0.901]))
    _, _, band, dots = beta.collections
    assert dots.get_offsets().tolist() == [[0, 0.5], [0, 0.54], [1, 0.4], [6, 0.7], [6, 0.74]]
    heights = {y for x, y in band.get_paths()[0].vertices.tolist() if x == 0}
    assert sorted(heights) == pytest.approx([0.52 - 0.0282843, 0.52 + 0.0282843], abs=1e-6)
    assert figures.sweeps(runs(*rows[:4])) is None


def test_trade_off_says_which_images() -> None:
    read = {"test_natural": 0.8, "test_autoattack": 0.4, "test_autoattack_images": 200}
    methods = [method for method in (*grid.MAIN, *grid.CONTROLS) if method not in ("clean", "literal")]
    digits = [
        row
        for i, method in enumerate(methods)
        for row in seeds(method, [0.70 + i / 500, 0.71 + i / 500], natural=0.98 + i / 5000)
    ]
    digits += seeds("literal", [0.1, 0.1], natural=0.1) + seeds("clean", [0.0])
    mnist = seeds("ramp", [0.5], dataset="mnist5k", eps=0.3, **read)
    mnist += seeds("adaptive", [0.5, 0.5], dataset="mnist5k", eps=0.3)
    claim = claims.Claim("mnist5k", 0.3, "ramp", "pgd-at", "test_autoattack", range(1))
    left, right = figures.trade_off(runs(*digits, *mnist), [claim]).axes
    assert left.get_ylabel() == "accuracy: APGD, validation images"
    assert left.get_xlabel() == "accuracy: natural, validation images"
    assert right.get_ylabel() == "accuracy: AutoAttack, first 200 test images"
    assert right.get_xlabel() == "accuracy: natural, test images"
    shown = {bar.get_label(): bar.lines[0].get_xydata()[0].tolist() for bar in left.containers}
    assert list(shown) == methods  # without those at chance, which would squeeze them
    looks = {(bar.lines[0].get_color(), bar.lines[0].get_marker()) for bar in left.containers}
    assert len(looks) == len(methods)
    assert shown["pgd-at"] == pytest.approx([0.981, 0.705])
    assert [bar.get_label() for bar in right.containers] == ["ramp"]  # the only one that was read
    assert right.containers[0].lines[0].get_xydata().tolist() == [[0.8, 0.4]]
    assert "Not shown: clean 90.0 / 0.0, literal 10.1 / 10.0" in [text.get_text() for text in left.texts]
    mnist[0] |= {"test_apgd": 0.6}
    other = figures.trade_off(runs(*mnist), [replace(claim, measure="test_apgd"), claim])
    assert other.axes[0].get_ylabel() == "accuracy: APGD, test images"
    assert figures.trade_off(runs(), [claim]) is None


def test_collapse_and_rescue() -> None:
    left, right = figures.collapse_and_rescue(curves("literal", "adaptive", "ramp"), "digits").axes
    assert [axes.get_title("left").split(":")[0] for axes in (left, right)] == ["literal", "adaptive"]
    epochs, clean = drawn(left, "clean")
    assert epochs == list(range(11))
    assert clean == pytest.approx([0.51 + epoch / 100 for epoch in epochs])
    assert drawn(left, "under PGD-10")[1] == pytest.approx([0.31] * 11)
    assert [line.get_ydata()[0] for line in left.lines if line.get_linewidth() < 1] == pytest.approx(
        [0.5, 0.52, 0.3, 0.32]
    )
    assert figures.collapse_and_rescue(curves("literal"), "digits") is None


def test_errors_per_epoch() -> None:
    table = curves("adaptive", "pgd-at", "pgd-at-warm")
    stopped = table[(table["seed"] == 0) | (table["epoch"] < 5)]
    natural, robust = figures.errors_per_epoch(stopped, "digits").axes
    labels = [line.get_label() for line in robust.lines if not line.get_label().startswith("_")]
    assert labels == ["pgd-at", "adaptive"]
    epochs, errors = drawn(natural, "pgd-at")
    assert epochs == list(range(5))  # of both seeds
    assert errors == pytest.approx([0.49 - epoch / 100 for epoch in range(5)])
    assert drawn(robust, "adaptive")[1] == pytest.approx([0.69] * 5)
    assert len({line.get_color() for line in robust.lines}) == 2
    assert figures.errors_per_epoch(table, "mnist5k") is None


def test_weights_are_percentiles_over_epochs() -> None:
    left, right = figures.weights(curves("ramp", "adaptive"), "digits").axes
    assert (left.get_title("left")[:8], right.get_title("left")[:4]) == ("adaptive", "ramp")
    epochs, median = drawn(left, "median")
    assert median == pytest.approx([0.505 + epoch / 1000 for epoch in epochs])
    for band, (low, high) in zip(left.collections, [(0.055, 0.955), (0.255, 0.755)], strict=True):
        heights = sorted({round(y, 6) for x, y in band.get_paths()[0].vertices.tolist() if x == 10})
        assert heights == pytest.approx([low + 0.01, high + 0.01])
    assert figures.weights(curves("ramp"), "digits") is None


# Files.


def test_only_the_named_block_changes(tmp_path) -> None:
    path = tmp_path / "a.md"
    path.write_text("é <!-- begin: a -->\nold\n<!-- end: a --> <!-- begin: b -->b<!-- end: b --> z\n", encoding="utf-8")
    once = "é <!-- begin: a -->\n\n| \\1 |\n\n<!-- end: a --> <!-- begin: b -->b<!-- end: b --> z\n"
    for _ in range(2):
        path.write_text(report.with_blocks(path, {"a": "| \\1 |\n"}), encoding="utf-8")
        assert path.read_text(encoding="utf-8") == once
    with pytest.raises(ValueError, match=r"a\.md: .* <!-- begin: c --> and <!-- end: c -->"):
        report.with_blocks(path, {"a": "new", "c": "new"})


BEGIN, END = "<!-- begin: a -->", "<!-- end: a -->"


@pytest.mark.parametrize("text", [BEGIN, END, END + BEGIN, 2 * (BEGIN + END)])
def test_markers_must_be_there_once_and_in_order(text) -> None:
    with pytest.raises(ValueError, match="must have the markers"):
        markdown.replaced(text, "a", "new")


@pytest.fixture
def pages(tmp_path) -> Path:
    """The documentation as it is in the repository."""
    for name in ("docs/study.md", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((report.ROOT / name).read_text())
    return tmp_path


NOTHING = records.frame([], records.REPLICATION)


def written(pages: Path, results: report.Results) -> list[str]:
    return [str(path.relative_to(pages)) for path in report.report(results, pages)]


def test_report_writes_what_there_is_data_for_and_the_same_bytes_again(pages) -> None:
    grid_runs = grid.grid("digits", None, range(2), full=True)
    rows = [run(r.method, r.seed, 0.9, 0.5 + 0.01 * r.seed, arch=r.arch, eps=r.eps) for r in grid_runs]
    made_up = report.Results(runs(*rows), curves("literal", "adaptive", "ramp"), runs(), NOTHING)
    pictures = ["sweeps", "trade_off", "collapse_and_rescue-digits", "errors_per_epoch-digits", "weights-digits"]
    before = (pages / "README.md").read_text()
    names = [*(f"docs/study/{name}.png" for name in pictures), "docs/study.md", "README.md"]
    assert written(pages, made_up) == names
    once = {name: (pages / name).read_bytes() for name in names}
    written(pages, made_up)
    assert once == {name: (pages / name).read_bytes() for name in names}
    for name in names[: len(pictures)]:
        assert b"Software" not in once[name]
        assert b"tIME" not in once[name]
        assert min(image.imread(pages / name).shape[:2]) > 400
    blocks = report.pages(made_up)["docs/study.md"]
    assert [name for name, text in blocks.items() if text.startswith("Not run")] == [
        "main-mnist5k", "main-cifar10", "test", "claims", "claims-again", "agreement",
        "replication-digits", "replication-mnist5k", "replication-together",
    ]  # fmt: skip
    study, readme = (once[name].decode() for name in names[len(pictures) :])
    for name, text in blocks.items():
        body = f"\n{text.strip()}\n\n" if text else ""
        assert f"<!-- begin: {name} -->\n{body}<!-- end: {name} -->" in study
    assert "\n300 validation images; 15 epochs, split seed 2026; cpu, torch 2.14.1, Python 3.11.7" in study
    assert "eps 0.2:\n\n| method |" in study
    assert "eps 0.12:\n\n| method |" in study
    assert "| pgd-at | 90.0 ± 0.0 | 50.5 ± 0.7 | 2 |" in readme
    outside = [
        re.split("<!-- begin: study -->.*<!-- end: study -->", text, flags=re.DOTALL) for text in (before, readme)
    ]
    assert len(outside[0]) == 2
    assert outside[0] == outside[1]


def test_what_a_new_csv_lacks_does_not_keep_its_old_numbers(pages) -> None:
    few = report.Results(runs(run("pgd-at", natural=0.823)), curves(), runs(), NOTHING)
    assert written(pages, few) == ["docs/study/trade_off.png", "docs/study.md", "README.md"]
    study = (pages / "docs/study.md").read_text()
    assert "| pgd-at | 82.3 |" in study
    assert len(re.findall("^Not run yet.$", study, re.MULTILINE)) == 13
    assert "<!-- begin: differences-digits -->\n<!-- end" in study
    twice = replace(few, runs=runs(run("pgd-at"), run("ramp"), run("ramp")))
    with pytest.raises(ValueError, match="got two of ramp"):
        written(pages, twice)
    assert (pages / "docs/study.md").read_text() == study


@with_data
def test_the_committed_pages_are_what_the_committed_csvs_say() -> None:
    for name, blocks in report.pages(report.load()).items():
        text = (report.ROOT / name).read_text()
        for block, content in blocks.items():
            assert markdown.replaced(text, block, content) == text, f"{block} in {name}: make study ARGS=--report"
