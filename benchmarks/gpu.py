"""On a GPU: its tests and benchmarks, one report named after the device in benchmarks/results.

python -m benchmarks.gpu          (--help explains the options)
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[1]


def run(*command: str, seconds: float) -> str:
    """What it printed, and how it ended if not well."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, timeout=max(1.0, seconds),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        printed = stopped.stdout or b""
        return f"{printed.decode() if isinstance(printed, bytes) else printed}\n**stopped: the time was up**\n"
    return done.stdout + (f"\n**exit status {done.returncode}**\n" if done.returncode else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA or ROCm GPU here")
    device, end = torch.cuda.get_device_name(), time.monotonic() + 60 * args.minutes
    # The benchmark first: it takes a minute or two, and the tests may take what is left.
    benchmark = run("benchmarks/loss.py", "--compile", seconds=end - time.monotonic())
    tests = run("-m", "pytest", "-q", "-m", "gpu", "--tb=short", seconds=end - time.monotonic())
    args.out.mkdir(parents=True, exist_ok=True)
    report = args.out / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.md"
    report.write_text(
        f"# {device}\n\ntorch {torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}. Made by "
        f"`make gpu`.\n\n## Forward and backward\n\n{benchmark}\n## Tests\n\n```\n{tests[-20_000:]}```\n"
    )
    print(report.read_text())


if __name__ == "__main__":
    main()
