"""benchmarks/step.py runs the algorithms that it names. No test asserts a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import machine

pytest.importorskip("torchvision", reason="the examples' networks need torchvision")

from benchmarks import step


@pytest.fixture
def bench() -> step.Bench:
    return step.Bench("wrn-10-1", batch=4, steps=3, device="cpu")


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("PGD-AT", 3 + 1, 0),
        ("CKTAT", 3 + 2, 1),  # one forward of twice the images
        ("TRADES", 2 * 3 + 3, 0),  # the clean images in each attack step, and twice for the loss
        ("TRADES, lean", 1 + 3 + 2, 0),
        ("the attack of PGD-AT and CKTAT", 3, 0),
        ("one forward", 1, 0),
    ],
)
def test_each_contender_runs_as_many_forwards_as_its_algorithm(
    bench: step.Bench, name: str, student: int, teacher: int
) -> None:
    images: Counter[str] = Counter()
    bench.model.register_forward_pre_hook(lambda _, inputs: images.update(student=len(inputs[0])))
    bench.criterion.teacher.register_forward_pre_hook(lambda _, inputs: images.update(teacher=len(inputs[0])))
    bench.contenders()[name]()
    assert (images["student"], images["teacher"]) == (4 * student, 4 * teacher)


@pytest.mark.parametrize("name", ["PGD-AT", "CKTAT", "TRADES", "TRADES, lean"])
def test_each_contender_trains_and_comes_back_to_train_mode(bench: step.Bench, name: str) -> None:
    before = [parameter.clone() for parameter in bench.model.parameters()]
    bench.contenders()[name]()
    assert all((one != two).any() for one, two in zip(before, bench.model.parameters(), strict=True))
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
