"""One run of the study: train a network unless it is there, measure it, and keep its record."""

import json
import os
import platform
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.study import measure, training
from benchmarks.study.grid import METHODS, NEEDED, SPLIT_SEED, Run
from cktat_loss import __version__


def do(run: Run, folder: Path, autoattack_images: int = 0) -> None:
    """Leave the record of a run (NAME.json) and its weights (NAME.pt) in the folder.

    The teacher and PGD-AT of the same seed must be there. A record that is there is kept.

    Args:
        autoattack_images: 0 leaves the test images alone. Otherwise the record gets the accuracies on the test images
            too, under AutoAttack on the first so many.
    """
    torch.set_num_threads(1)
    train_images, validation, test = training.images(run.dataset)
    path = record_path(run, folder)
    if not path.exists():
        began = time.perf_counter()
        teacher = None if run.method == "clean" else trained(replace(run, method="clean"), folder)
        net, epochs = training.train(run, teacher, train_images, validation)
        torch.save(net.state_dict(), _weights_path(run, folder))
        seconds = time.perf_counter() - began
        source = trained(replace(run, method="pgd-at"), folder) if run.method not in NEEDED else None
        record = {
            **asdict(run), "options": METHODS[run.method].settings, "split_seed": SPLIT_SEED,
            "epochs": training.epochs_of(run), **measure.on_validation(net, *validation, run.eps, source),
            "train_seconds": seconds, "measure_seconds": time.perf_counter() - began - seconds, "device": "cpu",
            "python": platform.python_version(), "torch": torch.__version__, "cktat_loss": __version__,
            "date": date.today().isoformat(),
        }  # fmt: skip
        _write(path, {"run": record, "epochs": epochs})
    if autoattack_images:
        saved = json.loads(path.read_text())
        saved["run"] |= measure.on_test(trained(run, folder), *test, run.eps, autoattack_images)
        _write(path, saved)


def record_path(run: Run, folder: Path) -> Path:
    """Return where the record of a run is, if the run is done."""
    return folder / f"{run.name}.json"


def trained(run: Run, folder: Path) -> nn.Module:
    """Return the network of a run that is done, in eval mode and frozen."""
    net = training.network(run.dataset, run.arch)
    net.load_state_dict(torch.load(_weights_path(run, folder), weights_only=True))
    return net.eval().requires_grad_(False)


def _weights_path(run: Run, folder: Path) -> Path:
    return folder / f"{run.name}.pt"


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file in one move, so that a run that is stopped leaves no half of a record."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)
