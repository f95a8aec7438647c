"""All benchmarks of this machine within some minutes, and the pages' tables and pictures; on a GPU, its tests first.

    python -m benchmarks                                                    (--help explains the options)
    python3 -m benchmarks --device cuda --minutes 5.5 --out FOLDER         in a checkout as it is: installs nothing

Each part is a process of its own with a time limit. On a GPU the report, <device>.md, is rewritten after each part.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import machine, markdown

NEEDED = {"cpu": ("matplotlib",), "cuda": ("triton", "pytest", "hypothesis", "matplotlib")}
GRACE = 12.0  # seconds of a part for its summary, after the signal that asks it to stop: pytest-xdist waits for 10
LONGEST = 12_000  # characters of a part's output that the report shows: its end


class Part(NamedTuple):
    title: str
    share: float  # of all the time
    command: tuple[str, ...]  # python -m ...
    needs: tuple[str, ...] = ()


class Outcome(NamedTuple):
    state: str  # good, or why not
    seconds: float
    printed: str


def parts(device: str, out: Path, compiling: bool) -> list[Part]:
    """Return the parts in their order. Accuracy on a GPU is measured without torch.compile, for the time's sake."""

    def program(title: str, share: float, name: str, compiles: bool = True) -> Part:
        options = () if compiles else ("--no-compile",)
        return Part(title, share, (f"benchmarks.{name}", "--device", device, "--out", str(out), *options))

    gpu = device == "cuda"
    step = program("A training step", 0.15 if gpu else 0.35, "step")._replace(needs=("torchvision",))
    return [
        *([Part("The tests that need a GPU", 0.25, tests())] if gpu else []),
        program("Speed", 0.45 if gpu else 0.4, "speed", compiling),
        program("Accuracy", 0.12 if gpu else 0.25, "accuracy", compiling and not gpu),
        step,
    ]


def tests() -> tuple[str, ...]:
    """Return the pytest command for the tests that need a GPU, in parallel if pytest-xdist is there."""
    has_option = "--backend" in (machine.ROOT / "tests" / "conftest.py").read_text()
    gpu = ("--backend=gpu",) if has_option else ("-m", "gpu")
    parallel = () if missing(["xdist"]) else ("-n", str(min(12, os.cpu_count() or 1)))
    quiet = ("-p", "no:cacheprovider", "--tb=short", "-q", "-rfEs")
    return ("pytest", *gpu, *quiet, *parallel, "tests/test_gpu.py")


def missing(names: Sequence[str]) -> str:
    return ", ".join(name for name in names if importlib.util.find_spec(name) is None)


def run(part: Part, seconds: float) -> Outcome:
    """Run a part for so long at most. What it prints goes to the screen when it is done."""
    if absent := missing(part.needs):
        return Outcome(f"left out: {absent} is missing", 0.0, "")
    print(f"\n== {part.title} (at most {seconds:.0f} s)", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *part.command],
            cwd=machine.ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code = process.wait(max(seconds - GRACE, seconds / 2))
            state = f"failed (exit status {code})" if code else "good"
        except subprocess.TimeoutExpired:
            state = f"stopped after {seconds:.0f} s"
            signal_all(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, seconds / 2))
        finally:
            signal_all(process, signal.SIGKILL)  # torch.compile's workers outlive a process that is stopped
            process.wait()
        file.seek(0)
        printed = file.read()[-LONGEST:]
    print(f"{printed}\n{state}", flush=True)
    return Outcome(state, time.monotonic() - began, printed)


def signal_all(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and to all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def page(outcomes: dict[Part, Outcome], measured: str) -> str:
    """Return the report of a GPU: how each part went, the tables, and what the parts printed."""
    garbage = "" if machine.computes() else "**The device computes nothing: every time on it is left out.**\n\n"
    lines = [[part.title, one.state, f"{one.seconds:.0f}"] for part, one in outcomes.items()]
    printed = [
        f"## {part.title}: {one.state}\n\n```\n{one.printed}\n```\n" for part, one in outcomes.items() if one.printed
    ]
    made = f"Made by `python3 -m benchmarks --device cuda`, {time.strftime('%Y-%m-%d %H:%M')}."
    table = markdown.table(["part", "how it went", "seconds"], lines)
    return "\n".join([f"# {machine.gpu()}\n\n{garbage}{made}\n\n{table}", measured, *printed])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("--minutes", type=float, help="for all of it (default: 9, on a GPU 5.5)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA or ROCm GPU here")
    if absent := missing(NEEDED[args.device]):
        parser.error(f"missing here: {absent}")
    minutes = args.minutes or {"cpu": 9.0, "cuda": 5.5}[args.device]
    from benchmarks import report

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: dict[Part, Outcome] = {}
    for part in parts(args.device, out, not args.no_compile):
        outcomes[part] = run(part, 60 * minutes * part.share)
        if args.device == "cuda":
            slug = machine.slug("cuda")
            try:
                measured = report.of_device(out, slug)
            except Exception as error:  # the CSVs are there, and the other parts have to run
                measured = f"The tables failed: {error!r}\n"
            (out / f"{slug}.md").write_text(page(outcomes, measured))
    if out == machine.RESULTS:
        report.main([])
    elif args.device == "cpu":
        report.draw(out)
    for part, one in outcomes.items():
        print(f"{part.title}: {one.state}, {one.seconds:.0f} s")
    return int(any(one.state.startswith("failed") for one in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
