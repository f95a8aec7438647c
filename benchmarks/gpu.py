"""On a GPU: is it right, how fast is it, what does the host pay? One report and one picture within six minutes.

    python3 -m benchmarks.gpu          (--help explains the options)

Runs in a checkout as it is: nothing is installed, nothing is fetched. It needs torch, triton, numpy, pytest,
hypothesis, matplotlib and a C compiler, and says what is missing. The most telling parts come first; when the time is
up, the report names what is left. Both files are named after the device.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "triton", "numpy", "pytest", "hypothesis", "matplotlib")
COMPILERS = ("cc", "gcc", "clang")
PYTEST = ("pytest", "--backend=gpu", "-p", "no:cacheprovider", "--tb=short", "-q", "-rfEs", "--ignore=tests/examples")
GRACE = 20.0  # seconds of a part for its summary after SIGINT: xdist waits 10 s for busy workers
LONGEST = 12_000  # characters of a part's output that the report shows: its end


class Part(NamedTuple):
    """A command, `python -m ...`, and the share of all the time that it may take, if so much is left."""

    title: str
    command: tuple[str, ...]
    share: float
    needs: tuple[str, ...] = ()


def parts(out: Path, minutes: float) -> list[Part]:
    where = ("--device", "cuda", "--out", str(out))
    pytest = (*PYTEST, "-n", "12") if found("xdist") else PYTEST  # Compiling takes longest, and workers share it.
    measuring = 0.35
    return [
        Part("Right on a GPU: streams, graphs, no waiting", (*pytest, "tests/test_gpu.py"), 0.2),
        Part(
            "Times, against eager, compiled and a copy",
            ("benchmarks.loss", *where, "--minutes", f"{0.8 * measuring * minutes:.2f}"),
            measuring,
        ),
        Part("What the host pays", ("benchmarks.host", "--out", str(out)), 0.1, needs=("benchmarks.host",)),
        Part("Errors against float64", ("benchmarks.accuracy", *where), 0.15),
        Part("Right on a GPU: all tests of the loss", (*pytest, "--ignore=tests/test_gpu.py"), 0.5),
        Part(
            "A training step",
            ("benchmarks.step", "--device", "cuda", "--batch", "128", "--out", str(out / "step-gpu.csv")),
            0.3,
            needs=("torchvision", "tyro"),
        ),
    ]


class Outcome(NamedTuple):
    state: str  # good, failed, stopped or left out, and why
    seconds: float = 0.0
    printed: str = ""


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if not found(name)]


def found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a module's parent
        return False


def complaint() -> str:
    """Why nothing can run here, in a sentence; empty if it can."""
    if absent := missing(NEEDED):
        return f"missing here: {', '.join(absent)} (needed: {', '.join(NEEDED)})"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), *COMPILERS))):
        return f"no C compiler ({', '.join(COMPILERS)}) is on the PATH; Triton builds its launchers with one"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA or ROCm GPU here"
    return ""


def run(part: Part, minutes: float, end: float) -> Outcome:
    if absent := missing(part.needs):
        return Outcome(f"left out: {', '.join(absent)} is missing")
    seconds, began = min(60 * part.share * minutes, end - time.monotonic()), time.monotonic()
    if seconds < 5:
        return Outcome("left out: the time was up")
    print(f"\n== {part.title} (at most {seconds:.0f} s)", flush=True)
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *part.command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(seconds - GRACE, seconds / 2))
            state = f"failed (exit status {code})" if code else "good"
        except subprocess.TimeoutExpired:
            state = f"stopped after {seconds:.0f} s"
            with suppress(subprocess.TimeoutExpired, ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(min(GRACE, seconds / 2))
        with_children_gone(process)
        file.seek(0)
        printed = file.read()
    print(f"{printed[-LONGEST:]}\n{state}", flush=True)
    return Outcome(state, time.monotonic() - began, printed)


def with_children_gone(process: subprocess.Popen[bytes]) -> None:
    """Ends what the process has started too: torch.compile's workers outlive it when it is stopped."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tables(out: Path, slug: str, since: float) -> str:
    """Of the CSVs that this run wrote. Saves the picture too."""
    from benchmarks import machine, plots
    from benchmarks import tables as made

    text = ""
    loss, accuracy = (out / f"{name}-{slug}.csv" for name in ("loss", "accuracy"))
    if loss.exists() and loss.stat().st_mtime >= since:
        rows = machine.read(loss)
        plots.save(plots.time_against_classes(rows), out / f"{slug}.png")
        text += f"![Time against the number of classes]({slug}.png)\n\n{made.loss_report(rows, title='##')}\n"
    if accuracy.exists() and accuracy.stat().st_mtime >= since:
        text += f"## Accuracy\n\n{made.accuracy_tables(machine.read(accuracy))}\n"
    return text


def report(title: str, outcomes: dict[Part, Outcome], measured: str, garbage: bool) -> str:
    from benchmarks import markdown

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in NEEDED)
    lines = [[part.title, one.state, f"{one.seconds:.0f}"] for part, one in outcomes.items()]
    warning = "**The device does not compute what it is told: every number here is garbage.**\n\n" if garbage else ""
    printed = "".join(
        f"## {part.title}: {one.state}\n\n```\n{one.printed[-LONGEST:]}\n```\n\n"
        for part, one in outcomes.items()
        if one.printed
    )
    return (
        f"# {title}\n\n{warning}Python {platform.python_version()}, {versions}, {time.strftime('%Y-%m-%d')}. Made by "
        f"`python3 -m benchmarks.gpu`.\n\n{markdown.table(['part', 'how it went', 'seconds'], lines)}\n{measured}\n"
        f"{printed}".rstrip()
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=5.5, help="for all of it (default: %(default)s)")
    args = parser.parse_args(arguments)
    began, end = time.time(), time.monotonic() + 60 * args.minutes
    if why := complaint():
        parser.exit(2, f"benchmarks.gpu cannot run: {why}\n")
    import torch

    from benchmarks import machine

    device, slug, out = torch.cuda.get_device_name(), machine.slug("cuda"), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    garbage = not machine.computes()
    outcomes = {part: run(part, args.minutes, end) for part in parts(out, args.minutes)}
    text = report(device, outcomes, tables(out, slug, began), garbage)
    (out / f"{slug}.md").write_text(text)
    print(f"\n{text}\nsaved {out / slug}.md")
    return int(garbage or any(one.state.startswith("failed") for one in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
