"""benchmarks.gpu says what it lacks, ends in time, and hides neither what failed nor what is garbage."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, machine

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def python(program: str) -> tuple[str, ...]:
    """A part's command that runs a program: the module `timeit` executes its argument once."""
    return ("timeit", "-n", "1", "-r", "1", program)


@without_a_gpu
def test_without_a_gpu_it_says_so_and_stops(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")],
        cwd=machine.ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "sees no CUDA or ROCm GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


def test_it_names_all_that_is_missing(monkeypatch):
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package", "another_one.of_them"))
    assert gpu.complaint().startswith("missing here: no_such_package, another_one.of_them (needed: torch,")


def test_it_asks_for_a_compiler(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert "no C compiler" in gpu.complaint()


@pytest.mark.parametrize("xdist", [True, False])
def test_tests_are_shared_between_workers_where_xdist_is_found(monkeypatch, tmp_path, xdist):
    monkeypatch.setattr(gpu, "found", lambda name: xdist)
    commands = [" ".join(part.command) for part in gpu.parts(tmp_path, minutes=5.5)]
    assert [("-n 12" in command) for command in commands if command.startswith("pytest")] == [xdist, xdist]


def test_every_measurement_is_saved_with_the_report(tmp_path):
    for part in gpu.parts(tmp_path, minutes=5.5):
        assert part.command[0] == "pytest" or str(tmp_path) in " ".join(part.command)


def test_a_part_may_sum_up_before_it_is_stopped():
    program = (
        "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('the summary', flush=True); time.sleep(600)"
    )
    outcome = gpu.run(gpu.Part("sums up", python(program), share=1.0), minutes=5 / 60, end=time.monotonic() + 60)
    assert outcome.state == "stopped after 5 s"
    assert "the summary" in outcome.printed


def test_its_shares_leave_room_for_all_but_the_last_parts(tmp_path):
    parts = gpu.parts(tmp_path, minutes=8.5)
    assert sum(part.share for part in parts[:4]) <= 0.8
    assert [part.command[0] for part in parts] == [
        "pytest", "benchmarks.loss", "benchmarks.host", "benchmarks.accuracy", "pytest", "benchmarks.step",
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
def test_a_part_is_stopped_with_what_it_has_started(tmp_path):
    pid = tmp_path / "pid"
    program = (
        "import subprocess, time; print('begun', flush=True); "
        f"open({str(pid)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid)); time.sleep(600)"
    )
    part = gpu.Part("sleeps", python(program), share=1.0)
    outcome = gpu.run(part, minutes=5 / 60, end=time.monotonic() + 60)
    assert outcome.state == "stopped after 5 s"
    assert outcome.printed.startswith("begun")
    child = Path("/proc", pid.read_text(), "status")

    def runs() -> bool:
        with suppress(FileNotFoundError, ProcessLookupError):
            return "State:\tZ" not in child.read_text()  # which has ended, if nobody has asked for its status yet
        return False

    deadline = time.monotonic() + 10  # it was killed, and dies when it is its turn
    while runs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs()


@pytest.mark.parametrize(("program", "state"), [("print(6 * 7)", "good"), ("1 / 0", "failed (exit status 1)")])
def test_how_a_part_went(program, state):
    outcome = gpu.run(gpu.Part("short", python(program), share=1.0), minutes=1, end=time.monotonic() + 60)
    assert outcome.state == state
    assert ("42" in outcome.printed) == (state == "good")


def test_what_cannot_run_is_left_out_with_a_reason():
    late = gpu.run(gpu.Part("late", python(""), share=1.0), minutes=1, end=time.monotonic() + 1)
    assert late.state == "left out: the time was up"
    part = gpu.Part("needy", python(""), share=1.0, needs=("no_such_package",))
    assert gpu.run(part, minutes=1, end=time.monotonic() + 60).state == "left out: no_such_package is missing"


@pytest.mark.parametrize("garbage", [False, True])
def test_the_report(garbage):
    outcomes = {
        gpu.Part("one", ("a",), 0.5): gpu.Outcome("good", 12.3, "numbers"),
        gpu.Part("two", ("b",), 0.5): gpu.Outcome("left out: the time was up"),
    }
    text = gpu.report("Some GPU", outcomes, "the tables", garbage)
    assert ("every number here is garbage" in text) == garbage
    assert "| one | good | 12 |\n| two | left out: the time was up | 0 |" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert text.index("the tables") < text.index("## one: good\n\n```\nnumbers")
    assert "## two" not in text
