"""One run of the study: train it or go on training it, measure it, keep its record."""

import argparse
import contextlib
import json
import platform
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import checkpoint
import torch
import train_cktat
import train_clean
from checkpoint import replacing
from distributed import Ranks
from engine import launch, open_data
from logbook import LABEL_PROBABILITY, Row, read
from models import from_checkpoint
from torch import nn

from lab import measure
from lab.pool import Stopped
from lab.records import Epoch, Record
from lab.runs import METHODS, SETTINGS, SPLIT_SEED, Run
from lab.variants import changed

RECORD, NETWORK = "record.json", "last.pt"
NEEDED = ("clean", "pgd-at")  # by all other methods: their teacher, and whose adversarial images they are shown


class Failed(Exception):
    """A run ended without a network; output.txt in its folder has what it had printed."""


def train_and_measure(run: Run, root: Path, extra: str) -> None:
    """Leave the record of a run in its folder. A run that had been stopped goes on where it was.

    Args:
        run: what to do. A "clean" run makes the teacher that all others of its seed begin with, and "pgd-at" the
            network whose adversarial images they are shown: these two come first.
        root: folder of the study.
        extra: options of the training commands, after the study's own.

    Raises:
        Failed: training ended without a network.
        Stopped: by SIGTERM.
    """
    folder, args = root / run.name, arguments(run, root, extra)
    with _into(folder / "output.txt"):
        if run.method != "clean":
            trained(replace(run, method="clean"), root)
        _train(run, root, extra)
        started = time.perf_counter()
        network = trained(run, root).to(args.device)
        source = None
        if run.method not in NEEDED:
            source = trained(replace(run, method="pgd-at"), root).to(args.device)
        images = open_data(args, Ranks(args.device)).validation
        measured = measure.on_validation(network, images, run.eps, source)
    record = Record(
        **asdict(run),
        **told(run, extra),
        **measured,
        test_natural=None,
        test_pgd20=None,
        test_apgd=None,
        test_autoattack=None,
        test_autoattack_images=None,
        train_seconds=sum(row["train_seconds"] for row in read(_network(run, root).parent / "log.csv")),
        measure_seconds=time.perf_counter() - started,
        device=measure.device_name(args.device),
        python=platform.python_version(),
        torch=torch.__version__,
        cktat_loss=version("cktat-loss"),
        date=date.today().isoformat(),
    )
    _save(folder, record)


def read_test(run: Run, root: Path, extra: str, autoattack_images: int) -> None:
    """Add to the record of a finished run what the test images say: the final read."""
    folder, args = root / run.name, arguments(run, root, extra)
    with _into(folder / "output.txt"):
        network = trained(run, root).to(args.device)
        images = open_data(args, Ranks(args.device)).test
        measured = measure.on_test(network, images, run.eps, autoattack_images)
    _save(folder, replace(record_of(run, root), **measured))


def trained(run: Run, root: Path) -> nn.Module:
    """The network of a run.

    Raises:
        Failed: it has not been trained to the end, or not at all: what began with it would be another experiment.
    """
    path = _network(run, root)
    state = checkpoint.load(path) if path.exists() else {"epoch": 0, "config": {"epochs": None}}
    if state["epoch"] != state["config"]["epochs"]:
        raise Failed(f"{run.name} is not trained to the end")
    return from_checkpoint(path)


def find_data(run: Run, extra: str) -> None:
    """Open the images of a run once, before many processes do: what is to be downloaded is, and what is missing known.

    Raises:
        MissingData: they are not there.
    """
    args = arguments(run, Path(), extra)
    open_data(args, Ranks(args.device))


def told(run: Run, extra: str) -> dict[str, str | int]:
    """What a run is told, beside its name: of two runs with one name, whether they are the same."""
    method, args = METHODS[run.method], arguments(run, Path(), extra)
    changes = ", ".join(f"{name}={value}" for name, value in method.change.items())
    options = " | ".join(filter(None, (f"{method.options} {extra}".strip(), changes)))
    return {"options": options, "split_seed": args.split_seed, "epochs": args.epochs}


def record_of(run: Run, root: Path) -> Record | None:
    """What a run left, or None if it is not done."""
    return _read(root / run.name / RECORD)


def run_of(line: Record | Epoch) -> Run:
    """Whose line it is. A CSV holds six digits of eps: compare names."""
    return Run(line.dataset, line.arch, line.method, line.eps, line.seed)


def finished(root: Path) -> list[tuple[Record, list[Epoch]]]:
    """All that is done in a study's folder: records and curves. A teacher's curve is none: nothing attacks it."""
    done = []
    for path in sorted(root.glob(f"*/*/*/{RECORD}")):
        record = _read(path)
        rows = read(path.with_name("log.csv")) if record.method != "clean" else []
        done.append((record, [_epoch(record, row) for row in rows]))
    return done


def _epoch(record: Record, row: Row) -> Epoch:
    run = {name: getattr(record, name) for name in ("dataset", "arch", "method", "eps", "seed")}
    columns = ("clean_accuracy", "pgd_accuracy", "guidance", "consistency", *LABEL_PROBABILITY)
    return Epoch(**run, epoch=int(row["epoch"]), **{name: row[name] for name in columns})


def arguments(run: Run, root: Path, extra: str) -> argparse.Namespace:
    """The options of the command that trains it; it leaves with a message where one is not to be had."""
    setting, method, folder = SETTINGS[run.dataset], METHODS[run.method], _network(run, root).parent
    argv = [*_common(run), "--out", str(folder), "--epochs"]
    if run.method == "clean":
        return train_clean.parse_args([*argv, str(setting.teacher_epochs), *shlex.split(extra)])
    teacher = _network(replace(run, method="clean"), root)
    argv += [str(setting.epochs * method.longer), "--eps", str(run.eps), "--teacher", str(teacher), "--apgd-check", "0"]
    return train_cktat.parse_args([*argv, *shlex.split(method.options), *shlex.split(extra)])


def _common(run: Run) -> list[str]:
    setting = SETTINGS[run.dataset]
    return [
        "--dataset", run.dataset, "--arch", run.arch, "--seed", str(run.seed), "--split-seed", str(SPLIT_SEED),
        "--validation", str(setting.validation), "--resume", *shlex.split(setting.options),
    ]  # fmt: skip


def _train(run: Run, root: Path, extra: str) -> None:
    args = arguments(run, root, extra)
    if run.method == "clean":
        code = launch(train_clean.run, args)
    else:
        code = launch(partial(train_cktat.run, new_method=changed(METHODS[run.method].change)), args)
    if code == 128 + signal.SIGTERM:
        raise Stopped
    if code:
        raise Failed(f"{run.name}: training ended with exit code {code}")


def _network(run: Run, root: Path) -> Path:
    """Of its last epoch. All "clean" runs of a seed share the teacher's."""
    folder = root / run.name if run.method != "clean" else root / run.dataset / run.arch / f"teacher-seed{run.seed}"
    return folder / NETWORK


@contextlib.contextmanager
def _into(path: Path) -> Iterator[None]:
    """What is printed goes to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _read(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def _save(folder: Path, record: Record) -> None:
    with replacing(folder / RECORD) as file:
        file.write(json.dumps(asdict(record), indent=2).encode())
