"""benchmarks/speed.py measures what its columns say. No test asserts a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import machine, speed
from benchmarks.speed import BETA, EAGER, TAU, Problem

COMPILED = {"usual, compiled": speed.usual, "ours, compiled": speed.ours}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds, and no real compilation, which takes half a minute."""
    monkeypatch.setattr(speed, "compiled", lambda: COMPILED)
    monkeypatch.setattr(speed, "MOST_ROUNDS", speed.FEWEST_ROUNDS)


# The contenders.


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_contenders_agree(reduction: str) -> None:
    logits = torch.randn(3, 8, 5, dtype=torch.float64)
    expected = speed.usual(*logits, TAU, BETA, reduction)
    assert expected.shape == (() if reduction == "batchmean" else (8,))
    for loss in EAGER.values():
        torch.testing.assert_close(loss(*logits, TAU, BETA, reduction), expected)


def test_a_step_computes_both_gradients_and_leaves_none() -> None:
    logits = Problem(8, 5, "float32", "independent").make("cpu")
    seen: list[torch.Tensor] = []
    for x in logits[:2]:
        x.register_post_accumulate_grad_hook(lambda x: seen.append(x.grad.clone()))
    for name, call in speed.contenders(logits, compiling=False).items():
        seen.clear()
        call()
        assert [x.grad for x in logits] == [None] * 3
        assert len(seen) == 2, name
        assert all(gradient.abs().sum() > 0 for gradient in seen), name


def test_one_compilation_serves_all_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    loss = torch.compile(speed.usual, backend=counter, dynamic=False)
    monkeypatch.setattr(speed, "compiled", lambda: {"usual, compiled": loss})
    for n, classes in ((6, 10), (9, 10), (6, 100), (6, 7)):
        calls = speed.contenders(Problem(n, classes, "float32", "independent").make("cpu"), compiling=True)
        calls.get("usual, compiled", lambda: None)()
    assert counter.frame_count == 2, "one per number of classes, and 7 is not compiled for"
    torch.compiler.reset()


def test_small_kl_logits_have_one() -> None:
    apart = []
    for kind in ("small KL", "independent"):
        clean, adv, _ = Problem(128, 10, "float32", kind).make("cpu")
        apart.append((clean - adv).std().item())
    assert apart == pytest.approx([0.01, 4 * math.sqrt(2)], rel=0.1)


# The clocks and the counter.


def test_quantiles_by_hand() -> None:
    assert speed.quantiles([5, 1, 4, 2, 3, 6], "s") == {"s_20": 2, "s_50": 3.5, "s_80": 5}


def test_all_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read once per round, and each comes first in turn."""
    order: list[str] = []

    def clock(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or float(len(order))

    monkeypatch.setattr(speed, "MOST_ROUNDS", 3)
    times = speed.take_turns({name: clock(name) for name in "abc"})
    assert "".join(order) == "abcbcacab"
    assert times == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_rounds_end_with_the_time_but_not_before_the_fewest() -> None:
    assert len(speed.take_turns({"a": lambda: 0.0}, seconds=0.0)["a"]) == speed.FEWEST_ROUNDS
    assert len(speed.take_turns({"a": lambda: 0.0}, seconds=100.0)["a"]) == speed.MOST_ROUNDS == 30


def test_calls_are_repeated_and_launches_counted() -> None:
    launched = [5]

    def call() -> None:
        launched[0] += 3

    assert speed.cpu_seconds(call, 7) >= 0
    assert launched == [5 + 7 * 3]
    assert speed.launches(call, lambda: launched[0]) == 3


# The program. tests/test_memory.py shows that the measure of memory sees what it should.


def test_the_csv_has_every_problem_and_contender(fast: None, tmp_path: Path) -> None:
    words = ["--device", "cpu", "--out", str(tmp_path), "--shapes", "6x10", "4x3", "--dtypes", "float32", "bfloat16"]
    assert speed.main(words) == 0
    rows = machine.read(tmp_path / "speed-cpu.csv")
    assert [tuple(row[k] for k in ("n", "classes", "dtype", "logits", "contender")) for row in rows] == [
        (n, classes, dtype, kind, contender)
        for n, classes, more in ((6, 10, COMPILED), (4, 3, ()))
        for dtype in ("float32", "bfloat16")
        for kind in speed.KINDS["cpu"]
        for contender in (*EAGER, *more, "copy")
    ], "classes that are not compiled for have no compiled contenders"
    for row in rows:
        assert 0 < row["us_20"] <= row["us_50"] <= row["us_80"]
        assert row["rounds"] == speed.FEWEST_ROUNDS
        assert row["times_faster_50"] == 1 or row["contender"] != "usual"
        assert (row["peak_elements"] == "") == (row["contender"] == "copy")


@pytest.mark.parametrize(("name", "status"), [("usual, compiled", 0), ("ours, compiled", 1)])
def test_a_contender_that_fails_leaves_the_others(
    name: str, status: int, fast: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no Python.h\nand more")

    monkeypatch.setattr(speed, "compiled", lambda: {name: broken})
    words = ["--device", "cpu", "--out", str(tmp_path), "--shapes", "4x10"]
    assert speed.main(words) == status, "1 if one of ours fails"
    notes = {row["contender"]: row["note"] for row in machine.read(tmp_path / "speed-cpu.csv")}
    assert notes == {**dict.fromkeys((*EAGER, "copy"), ""), name: "RuntimeError: no Python.h"}
