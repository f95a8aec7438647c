"""python -m benchmarks runs its parts in order and in time, and hides neither what failed nor what is garbage."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the report needs matplotlib")
pytest.importorskip("torchvision", reason="the examples' networks need torchvision")

from benchmarks import __main__ as driver
from benchmarks import machine
from benchmarks.__main__ import PARTS, Outcome


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver.main(["--device", "cuda", "--out", str(tmp_path / "out")])
    assert "sees no CUDA or ROCm GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_names_all_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(driver.NEEDED, "cpu", ("torch", "no_such_package", "another"))
    with pytest.raises(SystemExit):
        driver.main(["--device", "cpu"])
    assert "missing here: no_such_package, another" in capsys.readouterr().err


def test_every_part_knows_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(driver, "missing", lambda _: "xdist")  # its workers take long to start
    for device, parts in PARTS.items():
        assert 0.9 < sum(part.share for part in parts) <= 1
        for part in parts:
            python, _, module, *options = driver.command(part, device, machine.RESULTS)
            if module == "pytest":
                tests = [python, "-m", "pytest", *options, "--collect-only"]
                done = subprocess.run(tests, cwd=machine.ROOT, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, done.stdout + done.stderr
                assert "test_gpu.py" in done.stdout
            else:
                with pytest.raises(SystemExit):
                    importlib.import_module(module).main([*options, "--nonsense"])
                assert "unrecognized arguments: --nonsense\n" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
def test_a_part_that_is_late_is_stopped_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "GRACE", 2.0)
    child = tmp_path / "child"
    program = f"""
import signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
open({str(child)!r}, "w").write(str(subprocess.Popen([sys.executable, "-c", deaf]).pid))
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("by SIGINT first, so that it can print what it has")
"""
    began = time.monotonic()
    outcome = driver.run("late", [sys.executable, "-c", program], 6.0)
    assert outcome.state == "stopped after 6 s"
    assert "by SIGINT first" in outcome.printed
    with suppress(FileNotFoundError):
        while "zombie" not in Path(f"/proc/{child.read_text()}/status").read_text():
            assert time.monotonic() - began < 30
            time.sleep(0.1)


def test_a_part_that_fails_says_so() -> None:
    outcome = driver.run("bad", [sys.executable, "-c", "print('why'); 1 / 0"], 60.0)
    assert outcome.state == "failed (exit status 1)"
    assert "why" in outcome.printed


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The states of the parts, by title. No part runs; it returns the seconds that it would have had."""
    found = {"Accuracy": "failed (exit status 1)"}

    def stand_in(title: str, command: Sequence[str], seconds: float) -> Outcome:
        return Outcome(title, found.get(title, "good"), seconds, "said")

    monkeypatch.setattr(driver, "run", stand_in)
    return found


def test_the_time_is_divided_and_a_failed_part_is_the_exit_status(
    states: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "missing", lambda names: "torchvision" if "torchvision" in names else "")
    words = ["--device", "cpu", "--out", str(tmp_path), "--minutes", "10"]
    assert driver.main(words) == 1
    states.clear()
    assert driver.main(words) == 0, "what is left out has not failed"
    assert capsys.readouterr().out.endswith(
        "Speed: good, 240 s\nAccuracy: good, 150 s\nA training step: left out: torchvision is missing, 0 s\n"
    )


@pytest.mark.parametrize(("computes", "name"), [(True, "A device"), (False, "no GPU")])
def test_the_report_of_a_gpu_shows_each_part_and_warns_of_garbage(
    computes: bool, name: str, states: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A device")
    monkeypatch.setattr(machine, "computes", lambda: computes)
    monkeypatch.setattr(driver, "missing", lambda _: "")
    slug = machine.slug("cuda")
    machine.write(tmp_path / f"accuracy-{slug}.csv", machine.read(machine.RESULTS / "accuracy-cpu.csv")[:3], "cpu")
    assert driver.main(["--device", "cuda", "--out", str(tmp_path), "--minutes", "10"]) == 1
    text = (tmp_path / f"{slug}.md").read_text()
    assert text.startswith(f"# {name}\n")
    assert "| Accuracy | failed (exit status 1) | 72 |" in text
    assert text.index("| ordinary: loss |") < text.index("## Accuracy: failed (exit status 1)\n\n```\nsaid\n```")
    assert ("computes nothing" in text) == (not computes)
