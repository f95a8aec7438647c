"""Where and when something was measured: what goes into every row of a CSV."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def slug(device: str) -> str:
    """What the device's files are named after: cpu, nvidia-h100-80gb-hbm3, ..."""
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: str) -> dict[str, str]:
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    return {
        "machine": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def free_bytes(device: str) -> int:
    """Memory that can be taken without pushing anything else out."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: half of what there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


@cache
def computes() -> bool:
    """Whether the GPU does what it is told. A stand-in of a driver, made to time the host alone, does not."""
    try:
        return torch.arange(1000, device="cuda").sum().item() == 499_500
    except RuntimeError:
        return False


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows as CSV, under all the names that any of them has; numbers with four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
