"""The runs of a study: train one or go on training it, measure it, keep its record."""

import json
import platform
import shlex
import time
from dataclasses import asdict, dataclass, replace
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


@dataclass(frozen=True)
class Folder:
    """Where a study's runs are, and what all of them are told."""

    root: Path
    extra: str  # options of the training command, after the study's own

    def train_and_measure(self, run: Run) -> None:
        """Leave the record of a run. A run that had been stopped goes on where it was.

        Two runs of a seed come first: "clean" makes the teacher that the others begin with, "pgd-at" the network whose
        adversarial images they are shown.

        Raises:
            UserError: training ended without a network, or one of the two did.
        """
        config = self.config_of(run)
        if run.method != "clean":
            self.trained(replace(run, method="clean"))
        if code := train.launch(config, lambda config, teacher: method_of(run, config, teacher)):
            raise UserError(f"{run.name}: training ended with exit code {code}")
        started, device = time.perf_counter(), device_of(config.device)
        source = self.trained(replace(run, method="pgd-at")) if run.method not in NEEDED else None
        images = train.open_data(config, Ranks(device)).validation
        record = {
            **asdict(run),
            **told(run.dataset, run.method, self.extra),
            **measure.on_validation(self.trained(run).to(device), images, run.eps, source),
            "train_seconds": sum(row["train_seconds"] for row in read_log(self._network(run) / "log.csv")),
            "measure_seconds": time.perf_counter() - started,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cktat_loss": __version__,
            "date": date.today().isoformat(),
        }
        self._save(run, record)

    def read_test(self, run: Run, autoattack_images: int) -> None:
        """Add to the record of a finished run what the test images say: the final read."""
        config = self.config_of(run)
        if config.threads is not None:  # as in training: runs side by side must not fight for the cores
            torch.set_num_threads(config.threads)
        device = device_of(config.device)
        images = train.open_data(config, Ranks(device)).test
        measured = measure.on_test(self.trained(run).to(device), images, run.eps, autoattack_images)
        self._save(run, {**self.record_of(run), **measured})

    def config_of(self, run: Run) -> train.Config:
        """The options of the command that trains it; it leaves with a message where one is not to be had."""
        setting, method = SETTINGS[run.dataset], METHODS[run.method]
        argv = [
            "--dataset", run.dataset, "--arch", run.arch, "--seed", str(run.seed), "--split-seed", str(SPLIT_SEED),
            "--validation", str(setting.validation), "--resume", "--out", str(self._network(run)),
            *shlex.split(setting.options),
        ]  # fmt: skip
        if run.method == "clean":
            argv += ["--epochs", str(setting.teacher_epochs)]
        else:
            teacher = self._network(replace(run, method="clean")) / "last.pt"
            argv += ["--epochs", str(setting.epochs * method.longer), "--teacher", str(teacher)]
            argv += ["--eps", str(run.eps), "--apgd-check", "0"]
        return train.parse([*argv, *shlex.split(method.options), *shlex.split(self.extra)])

    def trained(self, run: Run) -> nn.Module:
        """The network of a run, of its last epoch.

        Raises:
            UserError: it is not trained to the end: what began with it would be another experiment.
        """
        path = self._network(run) / "last.pt"
        state = load(path) if path.exists() else None
        if state is None or state["epoch"] != state["config"]["epochs"]:
            raise UserError(f"{run.name} is not trained to the end")
        return from_checkpoint(path)

    def record_of(self, run: Run) -> dict[str, Any] | None:
        """What a run left, or None if it is not done.

        Raises:
            UserError: it is the record of a run with the same name and other options.
        """
        path = self.root / run.name / RECORD
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        for name, value in told(run.dataset, run.method, self.extra).items():
            if record[name] != value:
                raise UserError(
                    f"{run.name} is there already, with {name} {record[name]!r} and not {value!r}: "
                    "give the options that it was made with, or another --out"
                )
        return record

    def finished(self) -> dict[str, pd.DataFrame]:
        """All that is done, as runs and curves. A teacher has no curve: nothing attacks it."""
        runs, epochs = [json.loads(path.read_text()) for path in self.root.glob(f"*/*/*/{RECORD}")], []
        for record in runs:
            which = {name: record[name] for name in WHICH}
            if record["method"] != "clean":
                epochs += [{**row, **which} for row in read_log(self.root / Run(**which).name / "log.csv")]
        return {"runs": frame(runs, RUN), "curves": frame(epochs, EPOCH)}

    def _network(self, run: Run) -> Path:
        """All "clean" runs of a seed share the teacher's, whatever their eps."""
        teacher = self.root / run.dataset / run.arch / f"teacher-seed{run.seed}"
        return teacher if run.method == "clean" else self.root / run.name

    def _save(self, run: Run, record: dict[str, Any]) -> None:
        path = self.root / run.name / RECORD
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(record, indent=2).encode())


@cache
def told(dataset: str, method_name: str, extra: str) -> dict[str, str | int]:
    """What a run is told, beside its name: of two runs with one name, whether they are the same."""
    setting, method = SETTINGS[dataset], METHODS[method_name]
    config = Folder(Path(), extra).config_of(Run(dataset, setting.arch, method_name, setting.eps[0], 0))
    changes = ", ".join(f"{name}={value}" for name, value in method.change.items())
    options = " | ".join(filter(None, (f"{method.options} {extra}".strip(), changes)))
    return {"options": options, "split_seed": config.split_seed, "epochs": config.epochs}


def method_of(run: Run, config: train.Config, teacher: nn.Module | None) -> Method:
    """What the training command's options ask for, with what the study changes of it."""
    method, change = train.method_of(config, teacher), METHODS[run.method].change
    if not change:
        return method
    return ChangedCKTAT(method.criterion, **change) if isinstance(method, CKTAT) else ChangedTRADES(**change)
