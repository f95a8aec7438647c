"""The study's pages: statistics by hand, tables of made-up runs, and committed pages that are what the CSVs say."""

# ruff: noqa: E402 (the modules under test need packages that may be missing)

import io
import math
from typing import Any

import pytest
import torch

for package in ("matplotlib", "mlxtend", "pandas", "pyautoattack", "scipy", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(package)

import pandas as pd

from benchmarks.study import figures, grid, records, tables, two_views
from benchmarks.study.claims import Claim

Rows = list[dict[str, Any]]
with_data = pytest.mark.skipif(
    not (grid.RESULTS / "runs.csv").exists(), reason="the source distribution leaves the study's data out"
)


def seeds(method: str, apgd: list[float], natural: float = 0.9, **other: Any) -> Rows:
    """Rows of runs.csv. PGD-20 is 5 points above APGD, CW-30 two."""
    return [
        {
            "dataset": "digits", "arch": "digits", "method": method, "eps": 0.2, "seed": seed, "split_seed": 2026,
            "epochs": 15, "natural": natural + seed / 500, "pgd20": value + 0.05, "cw30": value + 0.02, "apgd": value,
            "transfer": None, "zero_gradients": 0.25, "test_natural": None, "test_autoattack_images": None,
        } | other
        for seed, value in enumerate(apgd)
    ]  # fmt: skip


def lines(table: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows[2:]]


def test_an_interval_by_hand() -> None:
    """t with 4 degrees of freedom is 2.776445 at 0.975, and 4.604095 at 0.995, which is 5 comparisons."""
    differences = pd.Series([1.0, 2, 3, 4, 5])
    for comparisons, t, bold in ((1, 2.776445, True), (5, 4.604095, False)):
        half = t * math.sqrt(2.5) / math.sqrt(5)
        assert tables.interval(differences, comparisons) == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)
        assert tables.difference(differences, comparisons).startswith("**") is bold


def test_there_is_no_interval_without_spread() -> None:
    """One seed has no spread. The last differences are one image of 300 each, as a CSV rounds accuracies."""
    for differences in ([2.0], [2.0, 2.0], [100 * (0.976667 - 0.973333), 100 * (0.98 - 0.976667)]):
        assert "[" not in tables.difference(pd.Series(differences))


def test_pairs_share_all_but_the_method() -> None:
    ours, theirs = seeds("ramp", [0.70, 0.75, 0.80]), seeds("pgd-at", [0.60, 0.70, 0.71, 0.1])
    ours += [ours[0] | {"seed": 3, "eps": 0.12}, ours[0] | {"seed": 3, "arch": "digits-4"}, ours[0] | {"seed": 7}]
    ramp, pgd_at = pd.DataFrame(ours), pd.DataFrame(theirs)
    assert [*tables.paired(ramp, pgd_at, "apgd")] == pytest.approx([10, 5, 9])
    assert tables.paired(ramp, pgd_at, "test_natural").empty
    with pytest.raises(ValueError, match="not a one-to-one merge"):
        tables.paired(pd.concat([ramp, ramp[:1]]), pgd_at, "apgd")


def test_the_tables_of_made_up_runs() -> None:
    table = pd.DataFrame([
        *seeds("adaptive", [0.70, 0.72, 0.74], transfer=0.9), *seeds("pgd-at", [0.60, 0.63, 0.63]),
        *seeds("literal", [0.1, 0.1], natural=0.1), *seeds("detach", [0.1, 0.1], natural=0.1995),
        *seeds("adaptive", [0.1], eps=0.12), *seeds("ramp", [0.1], dataset="mnist5k"), *seeds("clean", [0.0]),
        *seeds("adaptive-tau1", [0.71, 0.75]),
    ])  # fmt: skip
    found = {line[0]: line[1:] for line in lines(tables.main_table(table, "digits", 0.2))}
    assert [*found] == ["clean", "pgd-at", "literal (collapsed)", "detach (1 of 2 collapsed)", "adaptive"]
    assert found["adaptive"] == ["90.2 ± 0.2", "77.0 ± 2.0", "72.0 ± 2.0", "+5.0", "+2.0", "+18.0", "25.0", "3"]
    assert found["clean"] == ["90.0", "5.0", "0.0", "+5.0", "+2.0", "-", "25.0", "1"]
    # Six intervals are corrected for: three methods besides the two that all need, natural and APGD.
    page = {line[0]: line[4] for line in lines(tables.page_table(table, "digits"))}
    assert page["adaptive"] == tables.difference(pd.Series([10.0, 9.0, 11.0]), 6)
    assert (page["clean"], page["pgd-at"]) == ("-", "-")
    # The search measures against the method that was changed.
    (tau1,) = lines(tables.search_table(table, "digits"))
    assert tau1[2:] == ["90.1 ± 0.1", "73.0 ± 2.8", "adaptive", "0.0", "+2.0", "+5.0", "2"]


def test_differences_are_corrected_for_all_that_are_shown() -> None:
    base = [0.70, 0.71, 0.72, 0.73, 0.74]
    ours = [apgd + gain for apgd, gain in zip(base, [0.01, 0.02, 0.03, 0.04, 0.05], strict=True)]
    table = pd.DataFrame([*seeds("pgd-at", base), *seeds("ramp", ours), *seeds("clean", [0.0])])
    # Two are shown (natural has no spread). t with 4 degrees of freedom at 1 - 0.05 / 4 is 3.495406.
    assert lines(tables.difference_table(table, "digits", 0.2)) == [["ramp", "0.0", "**+3.0 [+0.5, +5.5]**", "5"]]
    assert lines(tables.agreement_table(table, table.assign(epochs=3), "digits", 0.2)) == []
    assert lines(tables.agreement_table(table, table, "digits", 0.2))[0] == ["clean", "0.0", "0.0", "1"]


def test_claims_are_judged_by_all_of_their_seeds_and_by_no_others() -> None:
    claim = Claim("digits", 0.2, "ramp", "pgd-at", "test_autoattack", range(5))
    back = claim._replace(better="pgd-at", worse="ramp")

    def read(method: str, values: list[float], images: int = 200) -> Rows:
        rows = seeds(method, values, test_autoattack_images=images)
        return [row | {"test_autoattack": row["apgd"]} for row in rows]

    def verdicts(rows: Rows, *claims: Claim, comparisons: int = 1) -> list[list[str]]:
        return [line[2:] for line in lines(tables.claims_table(pd.DataFrame(rows), claims, comparisons))]

    ours, theirs = read("ramp", [0.61, 0.72, 0.83, 0.94, 1.0]), read("pgd-at", [0.6, 0.7, 0.8, 0.9, 0.95])
    more = [*read("ramp", [0.3] * 6)[5:], *read("pgd-at", [1.0] * 6)[5:]]
    first = ["AutoAttack, first 200 test", "**+3.0 [+1.0, +5.0]**", "yes", "5"]
    assert verdicts([*ours, *theirs, *more], claim) == [first]
    assert verdicts([*ours[:4], *theirs], claim)[0][1:] == ["-", "-", "4 of 5"]
    others = read("pgd-at", [0.6, 0.7, 0.8, 0.9, 0.95], 100)  # accuracies on other images are no pairs
    assert verdicts([*ours, *others], claim)[0][1:] == ["-", "-", "0 of 5"]
    # t at 1 - 0.05 / 6 is 3.961, half a width of 2.80; at 1 - 0.05 / 60 it is 7.3.
    assert [line[1:3] for line in verdicts([*ours, *theirs], claim, back, comparisons=3)] == [
        ["**+3.0 [+0.2, +5.8]**", "yes"], ["**−3.0 [−5.8, −0.2]**", "no"],
    ]  # fmt: skip
    assert verdicts([*ours, *theirs], claim, comparisons=30)[0][2] == "not shown"


def test_curves_are_means_of_the_epochs_that_every_seed_has() -> None:
    rows = [
        {"dataset": "digits", "arch": "digits", "method": method, "eps": 0.2, "seed": seed, "epoch": epoch,
         "clean_accuracy": 0.5 + epoch / 100 + seed / 50, "pgd_accuracy": 0.3}
        for method in ("literal", "adaptive") for seed in (0, 1) for epoch in range(11 - 6 * seed)
    ]  # fmt: skip
    left, _ = figures.collapse_and_rescue(pd.DataFrame(rows), "digits").axes
    (mean,) = [line for line in left.lines if line.get_label() == "clean"]
    assert [*mean.get_xdata()] == [0, 1, 2, 3, 4]
    assert [*mean.get_ydata()] == pytest.approx([0.51 + epoch / 100 for epoch in range(5)])


# Two views.


def test_a_single_view_has_its_other_half_from_another_class_faintly() -> None:
    (pool, _), (held_out, _) = two_views.glyphs()
    assert len({*map(str, torch.cat([pool[0], held_out[0]]).tolist())}) == 1797
    images, y = two_views.views(two_views.glyphs()[0], 50, 0)
    left = {str(glyph): int(label) for glyph, label in zip(pool[0].tolist(), pool[1], strict=True)}
    for i in range(50):
        multi, own, other = (images[kind][i, 0] for kind in ("multi", "left", "right"))
        assert torch.equal(multi[:, :8], own[:, :8])
        assert torch.equal(multi[:, 8:], other[:, 8:])
        assert left[str(multi[:, :8].tolist())] == y[i]
        assert other[:, :8].max() <= 0.3
        assert own[:, 8:].max() <= 0.3


def test_attacks_see_the_network_and_another_image_of_the_class_guides(monkeypatch: pytest.MonkeyPatch) -> None:
    images, y = two_views.views(two_views.glyphs()[0], 128, 0)
    net = two_views.train("clean", 0, None, (images["multi"], y), 1)
    torch.testing.assert_close(two_views.dense(net)(images["left"]), net(images["left"]), rtol=1e-4, atol=1e-5)

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(two_views.one_run, "train", lambda method, net, guide, *_, **__: seen.append(guide) or [net])
    two_views.train("other-tau2", 0, net, (images["multi"], y), 1)
    two_views.train("teacher-tau2", 0, net, (images["multi"], y), 1)
    other, own = ([*map(str, guide.tolist())] for guide in seen)
    assert sorted(other) == sorted(own)  # each image guides once
    asked = [own.index(guide) for guide in other]
    assert [*y[asked]] == [*y]
    assert not any(a == b for a, b in enumerate(asked))


def test_the_verdicts_of_two_views_need_all_seeds() -> None:
    def row(mu: float, seed: int, method: str) -> dict[str, Any]:
        lead = {"pgd-at": 0.05 + seed / 1000, "teacher-tau5": -0.05 - mu / 100 - seed / 1000}.get(method, 0)
        accuracies = {f"{kind}_natural": 0.8 - (lead if kind != "multi" else 0) for kind in ("multi", "left", "right")}
        robust = {f"{kind}_robust": 0.4 + lead for kind in ("multi", "left", "right")}
        return {"mu": mu, "seed": seed, "method": method, **accuracies, **robust, "learned": 1, "teachers_error": 0.2}

    def read(rows: Rows) -> pd.DataFrame:
        return two_views.read(io.StringIO(pd.DataFrame(rows).to_csv(index=False)))

    rows = [row(mu, seed, method) for mu in two_views.MUS for seed in two_views.SEEDS for method in two_views.METHODS]
    # PGD-AT loses 5 to 6.4 points on single views alone, where mu is not 0; tau 5 has as much more natural accuracy.
    gaps = two_views.gaps(read(rows), "pgd-at", "clean", "loss_of_view")
    assert [*gaps] == pytest.approx([6.0, 6.1, 6.2, 6.3, 6.4])
    holds = [line[-1] for line in lines(two_views.blocks(read(rows))["two-views"])]
    assert holds == ["yes", "yes", "not shown", "yes", "yes", "yes", "yes", "not shown"]
    assert {line[-1] for line in lines(two_views.blocks(read(rows[:-1]))["two-views"])} == {"-"}


# The committed files.


@with_data
def test_the_committed_pages_are_what_the_committed_csvs_say() -> None:
    texts = {page: (records.ROOT / page).read_text(encoding="utf-8") for page in records.PAGES}
    blocks = records.blocks()
    for page, text in texts.items():
        assert records.with_blocks(text, blocks) == text, f"{page}: make study ARGS=--report"
    for name in blocks:
        assert any(f"<!-- begin: {name} -->" in text for text in texts.values()), f"no page has a place for {name}"


@pytest.mark.parametrize("text", ["<!-- begin: a -->", "<!-- end: a -->", "<!-- end: a --><!-- begin: a -->"])
def test_a_page_with_half_of_a_block_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must have the markers"):
        records.with_blocks(text, {"a": "new", "b": "other"})
