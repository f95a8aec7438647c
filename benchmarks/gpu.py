"""On a GPU: its tests and benchmarks, one report named after the device in benchmarks/results.

python -m benchmarks.gpu          (--help explains the options)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

from benchmarks import machine, tables

BENCHMARKS_SHARE = 0.4  # of the time


def run(*command: str, seconds: float) -> tuple[str, int]:
    """What it printed, how it ended if not well, and its exit status."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=machine.ROOT, timeout=max(1.0, seconds),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        printed = stopped.stdout or b""
        text = printed.decode() if isinstance(printed, bytes) else printed
        return f"{text}\n**stopped: the time was up**\n", 1
    return done.stdout + (f"\n**exit status {done.returncode}**\n" if done.returncode else ""), done.returncode


def measured(out: Path, slug: str, since: float) -> str:
    """The tables of whatever came to be written, not of an earlier run's files."""

    def fresh(path: Path) -> bool:
        return path.exists() and path.stat().st_mtime >= since

    loss, accuracy = out / f"loss-{slug}.csv", out / f"accuracy-{slug}.csv"
    parts = [tables.loss_report(machine.read(loss), title="##")] if fresh(loss) else []
    if fresh(accuracy):
        parts += ["## Accuracy\n", tables.accuracy_for_readme(machine.read(accuracy))]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA or ROCm GPU here")
    device, end = torch.cuda.get_device_name(), time.monotonic() + 60 * args.minutes
    began, out, slug = time.time(), args.out.resolve(), machine.slug("cuda")
    # What only a GPU shows first, the tests that compile hundreds of kernels last: they may take what is left.
    pytest = ("-m", "pytest", "-v", "-m", "gpu", "--tb=short")
    own, failed = run(*pytest, "tests/test_gpu.py", seconds=120)
    options = ("--device", "cuda", "--out", str(out), "--minutes", str(BENCHMARKS_SHARE * args.minutes))
    printed, broken = run("-m", "benchmarks", *options, seconds=end - time.monotonic())
    suite, others = run(*pytest, "--ignore=tests/test_gpu.py", seconds=end - time.monotonic())
    report = out / f"{slug}.md"
    out.mkdir(parents=True, exist_ok=True)
    report.write_text(
        f"# {device}\n\ntorch {torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}. Made by "
        f"`make gpu`.\n\n{measured(out, slug, began)}\n## Tests\n\n```\n{own[-20_000:]}\n{suite[-20_000:]}```\n\n"
        f"## What the benchmarks printed\n\n```\n{printed[-20_000:]}```\n"
    )
    print(report.read_text())
    return max(failed, broken, others)


if __name__ == "__main__":
    sys.exit(main())
