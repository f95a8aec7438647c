"""benchmarks/accuracy.py: errors by hand, and all cases in the CSV."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, machine
from benchmarks.speed import EAGER


def test_errors_by_hand_and_a_nan_is_the_largest() -> None:
    true = torch.tensor([[2.0], [1e-4]]), torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [40.0, 0.0]])
    actual = torch.tensor([[2.5], [3e-4]]), torch.full((2, 2), 0.1), torch.tensor([[0.0, 0.5], [44.0, 0.0]])
    found = accuracy.errors(actual, true, torch.zeros(3, 2, 2), beta=4.0)
    assert found == {"loss": pytest.approx(0.25), "d_clean": pytest.approx(0.1 / 4), "d_adv": pytest.approx(0.1)}
    actual[1][0, 0] = torch.nan
    assert math.isnan(accuracy.errors(actual, true, torch.zeros(3, 2, 2), beta=4.0)["d_clean"])
    kl = accuracy.kl_errors(torch.tensor([1.5, -1.0, 2.0]), torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))
    assert kl == {"KL, median": 0.5, "KL, worst": 2.0, "KL, negative": pytest.approx(1 / 3)}


def test_the_csv_has_every_case_and_ours_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "ROWS", 6)
    accuracy.main(["--device", "cpu", "--out", str(tmp_path), "--no-compile"])
    rows = machine.read(tmp_path / "accuracy-cpu.csv")
    assert {row["contender"] for row in rows} == set(EAGER)
    assert {row["case"] for row in rows} == {case for case, _, _ in accuracy.CASES}
    assert len({row["true_kl"] for row in rows if row["case"] == "sweep"}) == len(accuracy.GAPS)
    for row in rows:
        if row["contender"] == "ours" and row["case"] in ("ordinary", "saturated", "masked classes"):
            assert row["value"] < 2e-5, row
