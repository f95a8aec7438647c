"""python -m benchmarks runs its parts in order and in time, and hides neither what failed nor what is garbage."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as driver
from benchmarks import machine
from benchmarks.__main__ import Outcome, Part


def python(program: str) -> tuple[str, ...]:
    """Return a part's command that runs a program: the module `timeit` executes its argument once."""
    return ("timeit", "-n", "1", "-r", "1", program)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_stops(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--device", "cuda", "--out", str(tmp_path / "out")],
        cwd=machine.ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "sees no CUDA or ROCm GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


def test_it_names_all_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(driver.NEEDED, "cpu", ("torch", "no_such_package", "another"))
    with pytest.raises(SystemExit):
        driver.main(["--device", "cpu"])
    assert "missing here: no_such_package, another" in capsys.readouterr().err


def test_the_parts_of_each_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "tests", lambda: ("pytest",))
    programs = {"cpu": ["speed", "accuracy", "step"], "cuda": ["pytest", "speed", "accuracy", "step"]}
    for device, expected in programs.items():
        parts = driver.parts(device, tmp_path, compiling=False)
        assert [part.command[0].removeprefix("benchmarks.") for part in parts] == expected
        assert 0.9 < sum(part.share for part in parts) <= 1
        for part in parts:
            if part.command[0] != "pytest":
                assert part.command[1:5] == ("--device", device, "--out", str(tmp_path))
                assert ("--no-compile" in part.command) == (part.title != "A training step")
        compiling = ["--no-compile" not in part.command for part in driver.parts(device, tmp_path, compiling=True)]
        assert compiling == {"cpu": [True, True, True], "cuda": [True, True, False, True]}[device], "not for accuracy"


def test_the_command_of_the_gpu_tests_is_one_that_pytest_knows() -> None:
    command = [sys.executable, "-m", *driver.tests(), "--collect-only"]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_gpu.py" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
def test_a_part_that_is_late_is_stopped_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "GRACE", 2.0)
    child, said = tmp_path / "child", tmp_path / "said"
    program = (
        "import signal, subprocess, sys, time; "
        "deaf = 'import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)'; "
        "started = subprocess.Popen([sys.executable, '-c', deaf]); "
        f"open({str(child)!r}, 'w').write(str(started.pid)); print('begun', flush=True); "
        f"signal.signal(2, lambda *_: (open({str(said)!r}, 'w').write('asked'), sys.exit(0))); time.sleep(60)"
    )
    began = time.monotonic()
    outcome = driver.run(Part("late", 1.0, python(program)), 7.0)
    assert time.monotonic() - began < 30
    assert outcome.state == "stopped after 7 s"
    assert "begun" in outcome.printed
    assert said.read_text() == "asked", "by SIGINT first, so that it can print what it has"
    status = Path(f"/proc/{child.read_text()}/status")
    with suppress(FileNotFoundError):
        while "zombie" not in status.read_text():
            assert time.monotonic() - began < 30
            time.sleep(0.1)


def test_a_part_that_fails_says_so() -> None:
    outcome = driver.run(Part("bad", 1.0, python("print('why'); 1 / 0")), 60.0)
    assert outcome.state == "failed (exit status 1)"
    assert "why" in outcome.printed
    absent = driver.run(Part("bad", 1.0, python("1"), needs=("no_such_package",)), 60.0)
    assert absent.state == "left out: no_such_package is missing"


def test_a_failed_part_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, float]] = []
    states = {"Speed": "good", "Accuracy": "failed (exit status 1)", "A training step": "left out: x is missing"}

    def stand_in(part: Part, seconds: float) -> Outcome:
        ran.append((part.title, seconds))
        return Outcome(states[part.title], 1.0, "")

    monkeypatch.setattr(driver, "run", stand_in)
    words = ["--device", "cpu", "--out", str(tmp_path), "--minutes", "10"]
    assert driver.main(words) == 1
    assert ran == [
        ("Speed", pytest.approx(240)),
        ("Accuracy", pytest.approx(150)),
        ("A training step", pytest.approx(210)),
    ]
    states["Accuracy"] = "good"
    assert driver.main(words) == 0


def test_the_report_shows_each_part_and_warns_of_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A device")
    outcomes = {
        Part("Right", 0.5, ()): Outcome("failed (exit status 1)", 3.0, "1 failed"),
        Part("Late", 0.5, ()): Outcome("stopped after 9 s", 9.0, ""),
    }
    for computes in (True, False):
        monkeypatch.setattr(machine, "computes", lambda computes=computes: computes)
        text = driver.page(outcomes, "## Tables\n")
        assert text.startswith("# A device\n" if computes else "# no GPU\n")
        assert "| Right | failed (exit status 1) | 3 |" in text
        assert "## Right: failed (exit status 1)\n\n```\n1 failed\n```" in text
        assert text.index("## Tables") < text.index("## Right")
        assert ("computes nothing" in text) == (not computes)
