"""One run of the study: train it or go on training it, measure it, keep its record."""

import json
import platform
import shlex
import time
from dataclasses import asdict, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import train
from methods import CKTAT, Method
from models import from_checkpoint
from runtime import Ranks, UserError, device_of, load, read_log, replacing
from torch import nn

from benchmarks.study import measure
from benchmarks.study.grid import METHODS, NEEDED, SETTINGS, SPLIT_SEED, Run
from benchmarks.study.records import EPOCH, RUN, WHICH, frame
from benchmarks.study.variants import ChangedCKTAT, ChangedTRADES
from cktat_loss import __version__

RECORD = "record.json"


def train_and_measure(run: Run, root: Path, extra: str) -> None:
    """Leave the record of a run in its folder. A run that had been stopped goes on where it was.

    Two runs of a seed come first: "clean" makes the teacher that the others begin with, "pgd-at" the network whose
    adversarial images they are shown.

    Args:
        root: folder of the study.
        extra: options of the training command, after the study's own.

    Raises:
        UserError: training ended without a network, or one of the two did.
    """
    config = config_of(run, root, extra)
    if run.method != "clean":
        trained(replace(run, method="clean"), root)
    if code := train.launch(config, lambda config, teacher: method_of(run, config, teacher)):
        raise UserError(f"{run.name}: training ended with exit code {code}")
    started, device = time.perf_counter(), device_of(config.device)
    source = trained(replace(run, method="pgd-at"), root) if run.method not in NEEDED else None
    images = train.open_data(config, Ranks(device)).validation
    record = {
        **asdict(run),
        **told(run.dataset, run.method, extra),
        **measure.on_validation(trained(run, root).to(device), images, run.eps, source),
        "train_seconds": sum(row["train_seconds"] for row in read_log(_folder(run, root) / "log.csv")),
        "measure_seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cktat_loss": __version__,
        "date": date.today().isoformat(),
    }
    _save(run, root, record)


def read_test(run: Run, root: Path, extra: str, autoattack_images: int) -> None:
    """Add to the record of a finished run what the test images say: the final read."""
    config = config_of(run, root, extra)
    device = device_of(config.device)
    images = train.open_data(config, Ranks(device)).test
    measured = measure.on_test(trained(run, root).to(device), images, run.eps, autoattack_images)
    _save(run, root, {**record_of(run, root, extra), **measured})


def config_of(run: Run, root: Path, extra: str) -> train.Config:
    """The options of the command that trains it; it leaves with a message where one is not to be had."""
    setting, method = SETTINGS[run.dataset], METHODS[run.method]
    argv = [
        "--dataset", run.dataset, "--arch", run.arch, "--seed", str(run.seed), "--split-seed", str(SPLIT_SEED),
        "--validation", str(setting.validation), "--resume", "--out", str(_folder(run, root)),
        *shlex.split(setting.options),
    ]  # fmt: skip
    if run.method == "clean":
        argv += ["--epochs", str(setting.teacher_epochs)]
    else:
        teacher = _folder(replace(run, method="clean"), root) / "last.pt"
        argv += ["--epochs", str(setting.epochs * method.longer), "--teacher", str(teacher)]
        argv += ["--eps", str(run.eps), "--apgd-check", "0"]
    return train.parse([*argv, *shlex.split(method.options), *shlex.split(extra)])


def method_of(run: Run, config: train.Config, teacher: nn.Module | None) -> Method:
    """What the training command's options ask for, with what the study changes of it."""
    method, change = train.method_of(config, teacher), METHODS[run.method].change
    if not change:
        return method
    return ChangedCKTAT(method.criterion, **change) if isinstance(method, CKTAT) else ChangedTRADES(**change)


def trained(run: Run, root: Path) -> nn.Module:
    """The network of a run, of its last epoch.

    Raises:
        UserError: it has not been trained to the end, or not at all: what began with it would be another experiment.
    """
    path = _folder(run, root) / "last.pt"
    state = load(path) if path.exists() else None
    if state is None or state["epoch"] != state["config"]["epochs"]:
        raise UserError(f"{run.name} is not trained to the end")
    return from_checkpoint(path)


@cache
def told(dataset: str, method_name: str, extra: str) -> dict[str, str | int]:
    """What a run is told, beside its name: of two runs with one name, whether they are the same."""
    setting, method = SETTINGS[dataset], METHODS[method_name]
    config = config_of(Run(dataset, setting.arch, method_name, setting.eps[0], 0), Path(), extra)
    changes = ", ".join(f"{name}={value}" for name, value in method.change.items())
    options = " | ".join(filter(None, (f"{method.options} {extra}".strip(), changes)))
    return {"options": options, "split_seed": config.split_seed, "epochs": config.epochs}


def record_of(run: Run, root: Path, extra: str) -> dict[str, Any] | None:
    """What a run left, or None if it is not done.

    Raises:
        UserError: it is the record of a run with the same name and other options.
    """
    path = root / run.name / RECORD
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    for name, value in told(run.dataset, run.method, extra).items():
        if record[name] != value:
            raise UserError(
                f"{run.name} is there already, with {name} {record[name]!r} and not {value!r}: "
                "give the options that it was made with, or another --out"
            )
    return record


def finished(root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All that is done in a study's folder: runs and epochs. A teacher has no epochs here: nothing attacks it."""
    runs, epochs = [json.loads(path.read_text()) for path in root.glob(f"*/*/*/{RECORD}")], []
    for record in runs:
        which = {name: record[name] for name in WHICH}
        if record["method"] != "clean":
            epochs += [{**row, **which} for row in read_log(root / Run(**which).name / "log.csv")]
    return frame(runs, RUN), frame(epochs, EPOCH)


def _folder(run: Run, root: Path) -> Path:
    """Of its network. All "clean" runs of a seed share the teacher's, whatever their eps."""
    return root / run.name if run.method != "clean" else root / run.dataset / run.arch / f"teacher-seed{run.seed}"


def _save(run: Run, root: Path, record: dict[str, Any]) -> None:
    path = root / run.name / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(record, indent=2).encode())
