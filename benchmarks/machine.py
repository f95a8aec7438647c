"""The machine and the date of a measurement, the CSVs that hold it, and the options that all programs share."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]  # of a CSV

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with --out and --device."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    made.add_argument("--device", default=default, choices=("cpu", "cuda"), help="(default here: %(default)s)")
    return made


def slug(device: str) -> str:
    """Return the name of the device as files carry it: cpu, nvidia-h100-80gb-hbm3, ..."""
    return re.sub(r"[^a-z0-9]+", "-", ("cpu" if device == "cpu" else gpu()).lower()).strip("-")


def gpu() -> str:
    """Return the name of the GPU, or "no GPU" for a stand-in."""
    return torch.cuda.get_device_name() if computes() else "no GPU"


@cache
def computes() -> bool:
    """True if the GPU computes. A stand-in for the driver, made to time the host alone, does not."""
    try:
        return torch.arange(1000, device="cuda").sum().item() == 499_500
    except RuntimeError:
        return False


def environment(device: str) -> dict[str, str]:
    """Return the columns that every row of a CSV has: machine, versions and date."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    where = {"machine": cpu} if device == "cpu" else {"machine": gpu(), "host": cpu}
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        **where,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(path: Path, rows: Sequence[Mapping[str, object]], device: str) -> None:
    """Write rows as CSV, floats with four digits, and the environment in each row. The file is never half."""
    where = environment(device)
    names = dict.fromkeys(name for row in (*rows, where) for name in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} | where for row in rows)
    path.with_suffix(".tmp").replace(path)


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV, with numbers as numbers. What a row does not have is an empty string."""
    with path.open(newline="") as file:
        return [{name: parsed(text) for name, text in row.items()} for row in csv.DictReader(file)]


def parsed(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
