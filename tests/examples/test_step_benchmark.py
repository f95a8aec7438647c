"""benchmarks/step.py times and counts what it says. No test asserts a time."""

import csv
import importlib.util
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.examples_path import imported

pytest.importorskip("tyro")

FILE = Path(__file__).parents[2] / "benchmarks" / "step.py"
TINY = ["--arch", "wrn-10-1", "--batch", "4", "--size", "8", "--steps", "2", "--rounds", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("step_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    with imported():
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def bench(benchmark):
    clock = benchmark.Phases("cpu", time.perf_counter)
    return benchmark.Bench("wrn-10-1", batch=4, size=8, steps=3, clock=clock, device="cpu")


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("pgd_at", 3 + 1, 0),
        ("cktat", 3 + 2, 1),  # one forward of twice the images
        ("trades", 2 * 3 + 3, 0),  # the clean images in each attack step, and twice for the loss
        ("trades_lean", 1 + 3 + 2, 0),
        ("one_forward", 1, 0),
    ],
)
def test_each_contender_runs_as_many_forwards_as_its_algorithm(bench, name, student, teacher):
    images = Counter()
    bench.model.register_forward_pre_hook(lambda _, inputs: images.update(student=len(inputs[0])))
    bench.criterion.teacher.register_forward_pre_hook(lambda _, inputs: images.update(teacher=len(inputs[0])))
    getattr(bench, name)()
    assert (images["student"], images["teacher"]) == (4 * student, 4 * teacher)


@pytest.mark.parametrize("name", ["pgd_at", "cktat", "trades", "trades_lean"])
def test_each_contender_trains_and_comes_back_to_train_mode(bench, name):
    before = [parameter.clone() for parameter in bench.model.parameters()]
    getattr(bench, name)()
    assert all((one != two).any() for one, two in zip(before, bench.model.parameters(), strict=True))
    assert all(module.training for module in bench.model.modules())


def test_the_table_and_the_csv(benchmark, tmp_path, capsys):
    out = tmp_path / "new" / "step.csv"
    benchmark.main([*TINY, "--out", str(out)])
    printed = capsys.readouterr().out
    for name in ("PGD-AT", "CKTAT", "TRADES", "TRADES, lean"):
        assert f"| {name} | " in printed
    for ratio in ("teacher / one forward", "CKTAT step / a TRADES step", "CKTAT step / a lean TRADES step"):
        assert ratio in printed
    assert "TRADES' code, which repeats the clean forward in every step of its attack" in printed
    assert "clock CPU time" in printed
    rows = [*csv.DictReader(out.read_text().splitlines())]
    assert {row["phase"] for row in rows if row["contender"] == "CKTAT"} == {"step", "attack", "teacher", "student"}
    assert {row["phase"] for row in rows if row["contender"] == "TRADES"} == {"step", "attack", "student"}
    for row in rows:
        assert 0 < float(row["s_20"]) <= float(row["s_50"]) <= float(row["s_80"])
        assert (row["arch"], row["attack_steps"], row["rounds"]) == ("wrn-10-1", "2", "2")
        assert row["date"]
        assert row["torch"]
        assert row["clock"] == "CPU time"


def test_one_thread_is_timed_by_its_own_time_and_several_by_the_clock_on_the_wall(benchmark, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(benchmark, "Phases", lambda device, now: used.append(now))
    monkeypatch.setattr(benchmark, "measure", lambda bench, rounds: sys.exit())
    for threads in ("2", "1"):
        with pytest.raises(SystemExit):
            benchmark.main([*TINY, "--threads", threads, "--out", str(tmp_path / "step.csv")])
    assert used == [time.perf_counter, time.process_time]


def test_operations_are_those_of_the_forwards_and_backwards(benchmark, bench):
    """A backward into the weights costs a forward; one into the input as well, but for the first layer's."""
    layers = []

    def count(layer, inputs, output):
        inner = layer.weight[0].numel()  # multiply-adds of one output
        layers.append(2 * inner * output.numel())

    hooks = [
        layer.register_forward_hook(count)
        for layer in bench.model.modules()
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    ]
    bench.one_forward()
    for hook in hooks:
        hook.remove()
    forward, steps = sum(layers), 3
    trained = 3 * forward - layers[0]
    expected = {
        "PGD-AT": 2 * steps * forward + trained,
        "CKTAT": 2 * steps * forward + forward + 2 * trained,
        "TRADES": 3 * steps * forward + 3 * trained,
        "TRADES, lean": forward + 2 * steps * forward + 2 * trained,
    }
    for name, step in bench.contenders.items():
        with benchmark.Flops() as counter:
            step()
        assert counter.total == expected[name], name


def test_hours_follow_from_the_operations(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "PEAK", 1e9)
    out = tmp_path / "step.csv"
    benchmark.main([*TINY, "--flops", "--size", "32", "--out", str(out)])
    found = re.search(r"^\| CKTAT \| ([\d.]+) \| 110 \| ([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    gflop, hours = map(float, found.groups())
    assert hours == pytest.approx(gflop * 49_000 * 110 / 0.4 / 3600, abs=0.06 / gflop * hours)
    assert not out.exists()


def test_ratios_are_taken_round_by_round(benchmark):
    seconds = [1.0, 10.0, 2.0, 4.0, 8.0, 16.0]
    times = {
        "PGD-AT": [{"attack": 0.75 * s, "student": 0.25 * s} for s in seconds],
        "CKTAT": [{"attack": 1.0 * s, "teacher": 0.5 * s, "student": 0.5 * s} for s in seconds],
    }
    ratios = {
        row["phase"]: (row["ratio_20"], row["ratio_80"])
        for row in benchmark.table(times)
        if row["contender"] == "CKTAT"
    }
    assert ratios == {"step": (2, 2), "attack": (1, 1), "teacher": (0.5, 0.5), "student": (0.5, 0.5)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "argument --rounds: got '0', wanted a whole number above 0"),
        (["--arch", "vgg"], "arch must be one of"),
    ],
)
def test_a_wrong_option_is_named(benchmark, capsys, options, message):
    with pytest.raises(SystemExit):
        benchmark.main(options)
    assert message in capsys.readouterr().err
