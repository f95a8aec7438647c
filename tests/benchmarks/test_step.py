"""benchmarks/step.py runs the algorithms that it names. No test asserts a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import machine

pytest.importorskip("torchvision", reason="the examples' networks need torchvision")

from benchmarks import step


@pytest.mark.parametrize(
    ("name", "student", "teacher", "trains"),
    [
        ("PGD-AT", 3 + 1, 0, True),
        ("CKTAT", 3 + 2, 1, True),  # one forward of twice the images
        ("TRADES", 2 * 3 + 3, 0, True),  # the clean images in each attack step, and twice for the loss
        ("TRADES, lean", 1 + 3 + 2, 0, True),
        ("the attack of PGD-AT and CKTAT", 3, 0, False),
        ("one forward", 1, 0, False),
    ],
)
def test_each_contender_runs_its_algorithm_and_is_in_train_mode_afterwards(
    name: str, student: int, teacher: int, trains: bool
) -> None:
    """Each image of the batch passes through the networks as often as in the algorithm."""
    bench = step.Bench("wrn-10-1", batch=4, steps=3, device="cpu")
    before = [parameter.clone() for parameter in bench.model.parameters()]
    images: Counter[str] = Counter()
    bench.model.register_forward_pre_hook(lambda _, inputs: images.update(student=len(inputs[0])))
    bench.criterion.teacher.register_forward_pre_hook(lambda _, inputs: images.update(teacher=len(inputs[0])))
    bench.contenders()[name]()
    assert (images["student"], images["teacher"]) == (4 * student, 4 * teacher)
    for one, two in zip(before, bench.model.parameters(), strict=True):
        assert (one != two).any() == trains
    assert all(module.training for module in bench.model.modules())


def test_the_csv_has_every_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step.speed, "MOST_ROUNDS", 2)
    step.main(["--arch", "wrn-10-1", "--batch", "2", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)])
    rows = machine.read(tmp_path / "step-cpu.csv")
    assert [row["contender"] for row in rows] == [*step.Bench("wrn-10-1", 2, 1, "cpu").contenders()]
    for row in rows:
        assert 0 < row["s_20"] <= row["s_50"] <= row["s_80"]
        assert (row["arch"], row["batch"], row["attack_steps"], row["rounds"]) == ("wrn-10-1", 2, 1, 2)


def test_ratios_are_taken_round_by_round() -> None:
    seconds = [1.0, 10.0, 2.0, 4.0, 8.0, 16.0]
    _, row = step.table({"PGD-AT": seconds, "CKTAT": [2 * s for s in seconds]})
    assert (row["ratio_20"], row["ratio_50"], row["ratio_80"]) == (2, 2, 2)
    assert row["s_50"] == 12
