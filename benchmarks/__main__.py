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
MINUTES = {"cpu": 9.0, "cuda": 5.5}
GRACE = 12.0  # seconds of a part for its summary, after the signal that asks it to stop: pytest-xdist waits for 10
LONGEST = 12_000  # characters of a part's output that the report shows: its end


class Part(NamedTuple):
    title: str
    share: float  # of all the time
    command: str  # python -m ...
    needs: tuple[str, ...] = ()


PARTS = {
    "cpu": (
        Part("Speed", 0.40, "benchmarks.speed"),
        Part("Accuracy", 0.25, "benchmarks.accuracy"),
        Part("A training step", 0.35, "benchmarks.step", needs=("torchvision",)),
    ),
    "cuda": (
        Part("The tests that need a GPU", 0.25, "pytest --backend=gpu -p no:cacheprovider --tb=short -q -rfEs"),
        Part("Speed", 0.45, "benchmarks.speed"),
        Part("Accuracy", 0.12, "benchmarks.accuracy --no-compile"),
        Part("A training step", 0.15, "benchmarks.step", needs=("torchvision",)),
    ),
}


class Outcome(NamedTuple):
    title: str
    state: str  # good, or why not
    seconds: float = 0.0
    printed: str = ""


def missing(names: Sequence[str]) -> str:
    return ", ".join(name for name in names if importlib.util.find_spec(name) is None)


def command(part: Part, device: str, out: Path) -> list[str]:
    """Return the command line of a part. The tests run in parallel if pytest-xdist is there."""
    if part.command.startswith("pytest"):
        workers = [] if missing(["xdist"]) else ["-n", str(min(12, os.cpu_count() or 1))]
        options = [*workers, "tests/test_gpu.py"]
    else:
        options = ["--device", device, "--out", str(out)]
    return [sys.executable, "-m", *part.command.split(), *options]


def run(title: str, command: Sequence[str], seconds: float) -> Outcome:
    """Run a command for so long at most. What it prints goes to the screen when it is done."""
    print(f"\n== {title} (at most {seconds:.0f} s)", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command, cwd=machine.ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
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
    return Outcome(title, state, time.monotonic() - began, printed)


def signal_all(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and to all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def page(outcomes: Sequence[Outcome], measured: str) -> str:
    """Return the report of a GPU: how each part went, the tables, and what the parts printed."""
    garbage = "" if machine.computes() else "**The device computes nothing: every time on it is left out.**\n\n"
    made = f"Made by `python3 -m benchmarks --device cuda`, {time.strftime('%Y-%m-%d %H:%M')}."
    lines = [[one.title, one.state, f"{one.seconds:.0f}"] for one in outcomes]
    table = markdown.table(["part", "how it went", "seconds"], lines)
    printed = [f"## {one.title}: {one.state}\n\n```\n{one.printed}\n```\n" for one in outcomes if one.printed]
    return "\n".join([f"# {machine.gpu()}\n\n{garbage}{made}\n\n{table}", measured, *printed])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = machine.parser(__doc__)
    parser.add_argument("--minutes", type=float, help=f"for all of it (default: {MINUTES})")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA or ROCm GPU here")
    if absent := missing(NEEDED[args.device]):
        parser.error(f"missing here: {absent}")
    from benchmarks import report  # needs matplotlib

    out, seconds = args.out.resolve(), 60 * (args.minutes or MINUTES[args.device])
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for part in PARTS[args.device]:
        if absent := missing(part.needs):
            outcomes.append(Outcome(part.title, f"left out: {absent} is missing"))
        else:
            outcomes.append(run(part.title, command(part, args.device, out), seconds * part.share))
        if args.device == "cuda":
            slug = machine.slug("cuda")
            try:
                measured = report.of_device(out, slug)
            except Exception as error:  # the CSVs are there, and the other parts have to run
                measured = f"The tables failed: {error!r}\n"
            (out / f"{slug}.md").write_text(page(outcomes, measured))
    if out == machine.RESULTS:
        report.main()
    elif args.device == "cpu":
        report.draw(out)
    for one in outcomes:
        print(f"{one.title}: {one.state}, {one.seconds:.0f} s")
    return int(any(one.state.startswith("failed") for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
