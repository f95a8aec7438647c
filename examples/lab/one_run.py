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

import torch
import train_cktat
import train_clean
from checkpoint import replacing
from distributed import Ranks
from engine import launch, open_data
from logbook import LABEL_PROBABILITY, Row, read
from models import from_checkpoint

from lab import measure
from lab.pool import Stopped
from lab.records import Epoch, Record
from lab.runs import METHODS, SETTINGS, SPLIT_SEED, Run
from lab.variants import changed

RECORD, NETWORK = "record.json", "last.pt"


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
        _train(run, args, shlex.split(extra))
        started = time.perf_counter()
        network = from_checkpoint(_network(run, root)).to(args.device)
        source = None
        if run.method not in ("clean", "pgd-at"):
            source = from_checkpoint(_network(replace(run, method="pgd-at"), root)).to(args.device)
        images = open_data(args, Ranks(args.device)).validation
        measured = measure.on_validation(network, images, run.eps, source)
    method = METHODS[run.method]
    changes = ", ".join(f"{name}={value}" for name, value in method.change.items())
    record = Record(
        **asdict(run),
        options=" | ".join(filter(None, (f"{method.options} {extra}".strip(), changes))),
        split_seed=args.split_seed,
        epochs=args.epochs,
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
        network = from_checkpoint(_network(run, root)).to(args.device)
        images = open_data(args, Ranks(args.device)).test
        measured = measure.on_test(network, images, run.eps, autoattack_images)
    _save(folder, replace(record_of(run, root), **measured))


def record_of(run: Run, root: Path) -> Record | None:
    """What a run left, or None if it is not done."""
    return _read(root / run.name / RECORD)


def run_of(line: Record | Epoch) -> Run:
    """Whose line it is. A CSV holds six digits of eps: compare names."""
    return Run(line.dataset, line.arch, line.method, line.eps, line.seed)


def has_network(run: Run, root: Path) -> bool:
    """Whether a run is done in this folder, so that others can begin with its network."""
    return (root / run.name / RECORD).exists()


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
    """The options of train_cktat.py for a run."""
    method, teacher = METHODS[run.method], replace(run, method="clean")
    argv = [
        *_common(run), "--epochs", str(SETTINGS[run.dataset].epochs * method.longer), "--eps", str(run.eps),
        "--teacher", str(_network(teacher, root)), "--out", str(_network(run, root).parent), "--apgd-check", "0",
        *shlex.split(method.options), *shlex.split(extra),
    ]  # fmt: skip
    return train_cktat.parse_args(argv)


def _common(run: Run) -> list[str]:
    setting = SETTINGS[run.dataset]
    return [
        "--dataset", run.dataset, "--arch", run.arch, "--seed", str(run.seed), "--split-seed", str(SPLIT_SEED),
        "--validation", str(setting.validation), "--resume", *shlex.split(setting.options),
    ]  # fmt: skip


def _train(run: Run, args: argparse.Namespace, extra: list[str]) -> None:
    if run.method == "clean":
        setting = SETTINGS[run.dataset]
        argv = [*_common(run), "--epochs", str(setting.teacher_epochs), "--out", str(args.out), *extra]
        code = train_clean.main(argv)
    else:
        new_method = changed(METHODS[run.method].change)
        code = launch(partial(train_cktat.run, new_method=new_method), args)
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
