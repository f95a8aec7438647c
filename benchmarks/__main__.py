"""All benchmarks of this machine, their pictures, and the tables of README and docs, within some minutes.

python -m benchmarks          (--help explains the options)
python -m benchmarks host     the host's share of a small loss, on a GPU: see benchmarks/host.py

Each program runs in a process of its own, so that none inherits another's memory, threads or compiled code.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine

LOSS_SHARE = 0.62  # of the time; accuracy needs a minute at most, most of it for compiling
# A step takes long: on a CPU a small batch, and on a GPU one that keeps it busy.
STEP = {"cpu": ("--batch", "8", "--rounds", "5"), "cuda": ("--batch", "128", "--rounds", "7")}


def run(name: str, *options: str, seconds: float) -> bool:
    """Whether it ended well, and in time. What it prints goes to the screen."""
    print(f"\n== {name}", flush=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *options], cwd=machine.ROOT, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        print(f"stopped: {name} was given {seconds:.0f} s")
        return False
    return done.returncode == 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--device", default=machine.default_device(), choices=("cpu", "cuda"), help="(default: a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args(arguments)
    end = time.monotonic() + 60 * args.minutes
    out = args.out.resolve()
    where = ("--device", args.device, "--threads", str(args.threads))
    compiling = ("--no-compile",) if args.no_compile else ()

    def left() -> float:
        return end - time.monotonic()

    minutes = ("--minutes", str(LOSS_SHARE * args.minutes))
    good = [
        run("loss", "--out", str(out), *where, *minutes, *compiling, seconds=left()),
        run("accuracy", "--out", str(out), *where, *compiling, seconds=left()),
    ]
    if importlib.util.find_spec("benchmarks.step"):
        file = out / f"step-{machine.slug(args.device)}.csv"
        good.append(run("step", "--out", str(file), *where, *STEP[args.device], seconds=left()))
    good.append(run("plots", "--results", str(out), seconds=60))
    if out == machine.RESULTS:  # the pages show these
        good.append(run("tables", seconds=60))
    if not all(good):
        raise SystemExit("not everything ended well")


if __name__ == "__main__":
    if sys.argv[1:2] == ["host"]:
        from benchmarks import host

        host.main(sys.argv[2:])
    else:
        main()
