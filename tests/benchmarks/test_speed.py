"""benchmarks/speed.py measures what its columns say. No test asserts a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import machine, speed
from benchmarks.kernels import counted

COMPILED = {"usual, compiled", "ours, compiled"}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds, and no real compilation, which takes half a minute."""
    losses = {"usual, compiled": speed.usual, "ours, compiled": speed.ours}
    compiled = {name: torch.compile(loss, backend="eager", dynamic=False) for name, loss in losses.items()}
    monkeypatch.setattr(speed, "compiled", lambda: compiled)
    monkeypatch.setattr(speed, "MOST_ROUNDS", speed.FEWEST_ROUNDS)


# The contenders.


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_contenders_agree(reduction: str) -> None:
    logits = torch.randn(3, 8, 5, dtype=torch.float64).unbind()
    expected = speed.usual(*logits, reduction=reduction)
    assert expected.shape == (() if reduction == "batchmean" else (8,))
    for loss in speed.EAGER.values():
        torch.testing.assert_close(loss(*logits, reduction=reduction), expected)


def test_a_step_computes_both_gradients_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = speed.make_logits(8, 5, "float32", "independent", "cpu")
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
    shapes = ((6, 4), (9, 4), (6, 5), (6, 7))
    for n, classes in shapes:
        logits = speed.make_logits(n, classes, "float32", "independent", "cpu")
        speed.any_rows(logits)
        loss(*logits)
    assert counter.frame_count == len({classes for _, classes in shapes}), "and each is compiled for its classes"
    torch.compiler.reset()


def test_small_kl_logits_have_one() -> None:
    apart = []
    for kind in ("small KL", "independent"):
        clean, adv, _ = speed.make_logits(128, 10, "float32", kind, "cpu")
        apart.append((clean - adv).std().item())
    assert apart == pytest.approx([0.01, 4 * math.sqrt(2)], rel=0.1)


# The clocks.


def test_quantiles_by_hand() -> None:
    assert speed.quantiles([5, 1, 4, 2, 3, 6], "s") == {"s_20": 2, "s_50": 3.5, "s_80": 5}
    assert speed.quantiles([7], "s") == {"s_20": 7, "s_50": 7, "s_80": 7}


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


def test_the_clock_repeats() -> None:
    calls: list[int] = []
    assert speed.cpu_seconds(lambda: calls.append(1), 7) >= 0
    assert len(calls) == 7


# Memory and launches.


def test_memory_of_a_known_case() -> None:
    x = torch.randn(64, 1000)

    def three_at_once() -> torch.Tensor:
        return (x + 1) * (x + 2)

    three_at_once()
    assert 3.0 <= speed.peak_bytes(three_at_once) / (4 * x.numel()) < 3.01


def test_launches_by_a_counter() -> None:
    launched = [5]

    def call() -> None:
        launched[0] += 3

    assert speed.launches(call, lambda: launched[0]) == 3


def test_the_count_of_operators_is_that_by_hand() -> None:
    x, y = (torch.randn(8, 5, dtype=torch.bfloat16) for _ in range(2))
    cost = counted(lambda: (x * y).sum())
    assert cost == (2, 3 * 40 + 40 + 1, 2 * (3 * 40 + 40 + 1))
    assert counted(lambda: x.t().view(5, 8)[0].expand(3, 8)).launches == 0, "views"
    assert counted(lambda: x[:1].expand(8, 5) + 1).elements == 5 + 40, "what is broadcast is read at its own size"


# The program.


def test_the_csv_has_every_problem_and_contender(fast: None, tmp_path: Path) -> None:
    words = ["--device", "cpu", "--out", str(tmp_path), "--shapes", "6x10", "4x3", "--dtypes", "float32", "bfloat16"]
    assert speed.main(words) == 0
    rows = machine.read(tmp_path / "speed-cpu.csv")
    found = {tuple(row[k] for k in ("n", "classes", "dtype", "logits", "contender")) for row in rows}
    assert len(found) == len(rows)
    assert found == {
        (n, classes, dtype, kind, contender)
        for n, classes, more in (("6", "10", COMPILED), ("4", "3", set()))
        for dtype in ("float32", "bfloat16")
        for kind in speed.KINDS["cpu"]
        for contender in {*speed.EAGER, "copy", *more}
    }, "classes that are not compiled for have no compiled contenders"
    for row in rows:
        assert 0 < float(row["us_20"]) <= float(row["us_50"]) <= float(row["us_80"])
        assert int(row["rounds"]) == speed.FEWEST_ROUNDS
        assert row["torch"] == torch.__version__
        assert (row["times_faster_50"] == "1") == (row["contender"] == "usual") or row["contender"] != "usual"
        assert (row["peak_elements"] == "") == (row["contender"] == "copy")


def test_a_contender_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no Python.h\nand more")

    monkeypatch.setattr(speed, "MOST_ROUNDS", speed.FEWEST_ROUNDS)
    words = ["--device", "cpu", "--out", str(tmp_path), "--shapes", "4x10"]
    for name, status in (("usual, compiled", 0), ("ours, compiled", 1)):
        monkeypatch.setattr(speed, "compiled", lambda name=name: {name: broken})
        assert speed.main(words) == status, "1 if one of ours fails"
        notes = {row["contender"]: row["note"] for row in machine.read(tmp_path / "speed-cpu.csv")}
        assert notes == {**dict.fromkeys((*speed.EAGER, "copy"), ""), name: "RuntimeError: no Python.h"}
        assert f"{name} failed" in capsys.readouterr().out
