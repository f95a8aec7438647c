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


def run(*command: str, seconds: float) -> tuple[str, int]:
    """What it printed, how it ended if not well, and its exit status."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, timeout=max(1.0, seconds),
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        printed = stopped.stdout or b""
        text = printed.decode() if isinstance(printed, bytes) else printed
        return f"{text}\n**stopped: the time was up**\n", 1
    return done.stdout + (f"\n**exit status {done.returncode}**\n" if done.returncode else ""), done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA or ROCm GPU here")
    device, end = torch.cuda.get_device_name(), time.monotonic() + 60 * args.minutes
    # What only a GPU shows first, the tests that compile hundreds of kernels last: they may take what is left.
    pytest = ("-m", "pytest", "-v", "-m", "gpu", "--tb=short")
    own, failed = run(*pytest, "tests/test_gpu.py", seconds=120)
    benchmark, broken = run("-m", "benchmarks.loss", seconds=min(150, end - time.monotonic()))
    suite, others = run(*pytest, "--ignore=tests/test_gpu.py", seconds=end - time.monotonic())
    args.out.mkdir(parents=True, exist_ok=True)
    report = args.out / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.md"
    report.write_text(
        f"# {device}\n\ntorch {torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}. Made by "
        f"`make gpu`.\n\n## Forward and backward\n\n{benchmark}\n"
        f"## Tests\n\n```\n{own[-20_000:]}\n{suite[-20_000:]}```\n"
    )
    print(report.read_text())
    return max(failed, broken, others)


if __name__ == "__main__":
    sys.exit(main())
